"""Checkpoints that are quantized already, read by ``--load-format octavo`` as what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import octavo
from helpers import write_checkpoint
from helpers.coded_models import by_modelopt, in_blocks, in_int4
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, digest, octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


@pytest.mark.parametrize(
    ("name", "source_of", "scheme"),
    [
        ("llama", in_blocks, "fp8_channel"),
        ("deepseek_v3", in_blocks, "fp8_block"),
        ("qwen3_moe", in_blocks, "fp8_channel"),
        ("deepseek_v3", in_int4, "fp8_channel"),
        ("llama", by_modelopt, "fp8_channel"),
    ],
)
def test_parameters_equal_those_of_the_converted_checkpoint(
    name: str, source_of: Callable[[Path, Path], Path], scheme: str, tmp_path: Path
) -> None:
    source = source_of(make(name, tmp_path / "bf16"), tmp_path / "coded")
    mine, stock = load(octavo_job(source, scheme), Job(convert(source, scheme)), timeout=500)
    for answer in (mine, stock):
        assert not answer.error, answer.error
    assert ("rounds them a second time" in mine.output) == (source_of != in_blocks or scheme != "fp8_block")
    assert any("float8_e4m3fn" in digest for digest in stock.parameters[0].values())
    assert mine.parameters == stock.parameters


def in_int8(plain: Path, folder: Path) -> Path:
    """W8A8 with scales that bf16 can't hold, as others write it."""
    octavo.convert(plain, folder, "int8_channel", format="compressed-tensors-w8a8", prove=False)
    stored = tensors_of(folder)
    stored = {name: tensor * 1.001 if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    config = json.loads((folder / "config.json").read_text())
    return write_checkpoint(folder.with_name("others"), stored, config=config)


def test_int8_stays_what_it_is(tmp_path: Path) -> None:
    """Scales in float32 do, and in packed int8 are rounded as vLLM rounds them."""
    source = in_int8(make("llama", tmp_path / "bf16"), tmp_path / "coded")
    jobs, formats = list[Job](), ("compressed-tensors-w8a8", "compressed-tensors")
    for format in formats:
        octavo.convert(source, tmp_path / format, "int8_channel", format=format, prove=False, reader="vllm")
        extra = {"scheme": "int8_channel", "format": format}
        jobs += [octavo_job(source, model_loader_extra_config=extra, kernels=False)]
        jobs += [Job(tmp_path / format, {"kernels": False})]
    answers = load(*jobs, timeout=500)
    for mine, stock in zip(answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.error
        assert not stock.error, stock.error
        assert mine.parameters == stock.parameters
    layer = "model.layers.0.self_attn.o_proj.weight"
    assert answers[0].parameters[0][layer] == digest(tensors_of(source)[layer])
    assert answers[0].parameters[0][f"{layer}_scale"] == digest(tensors_of(source)[f"{layer}_scale"])


def test_blocks_stay_and_bf16_becomes_channels_where_no_scheme_is_named(tmp_path: Path) -> None:
    source = in_blocks(make("llama", tmp_path / "bf16"), tmp_path / "coded")
    unnamed = {"load_format": "octavo"}
    pairs = [(source, "fp8_block"), (tmp_path / "bf16", "fp8_channel")]
    answers = load(*(job for path, scheme in pairs for job in (Job(path, unnamed), octavo_job(path, scheme))))
    for mine, named in zip(answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.error
        assert mine.parameters == named.parameters
    layer = "model.layers.0.self_attn.o_proj.weight"
    assert answers[0].parameters[0][layer] == digest(tensors_of(source)[layer])
    assert answers[0].output.count("it stays so (fp8_block), since any other scheme would round a second time") == 1


def in_mxfp4(name: str, folder: Path) -> Path:
    """Stacks of experts as gpt-oss has them."""
    plain = make(name, folder / "bf16")
    generator, stored = torch.Generator().manual_seed(0), {}
    for tensor_name, tensor in tensors_of(plain).items():
        if not tensor_name.endswith(("gate_up_proj", "down_proj")):
            stored[tensor_name] = tensor
            continue
        experts, cols, rows = tensor.shape
        shape = experts, rows, cols // 32
        stored[f"{tensor_name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        stored[f"{tensor_name}_scales"] = torch.randint(115, 122, shape, generator=generator, dtype=torch.uint8)
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = json.loads((plain / "config.json").read_text())
    return write_checkpoint(folder / "mxfp4", stored, config={**config, "quantization_config": declared})


def test_stacks_in_mxfp4_are_loaded_as_those_of_the_bf16_checkpoint_that_they_stand_for(tmp_path: Path) -> None:
    """vLLM has no FP8 layer for them: they have biases."""
    source = in_mxfp4("gpt_oss", tmp_path)
    octavo.convert(source, tmp_path / "decoded", None, prove=False)
    mine, plain = load(octavo_job(source), octavo_job(tmp_path / "decoded"), timeout=500)
    for answer in (mine, plain):
        assert not answer.error, answer.error
    assert any("float8_e4m3fn" in digest for digest in mine.parameters[0].values())
    assert mine.parameters == plain.parameters
