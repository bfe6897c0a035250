"""Checkpoints that are quantized already, read by ``--load-format octavo`` as what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import octavo
from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from helpers.sglang_checkpoints import convert, make
from helpers.sglang_loading import Job, digest, load, octavo_job

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]


def in_blocks(name: str, folder: Path, seed: int = 0) -> Path:
    """In FP8, as DeepSeek and Qwen publish it."""
    plain = make(name, folder / name / "bf16", seed)
    config = json.loads((plain / "config.json").read_text())
    stored = fine_grained(tensors_of(plain))
    return write_checkpoint(folder / name / "fp8", stored, config={**config, "quantization_config": FINE_GRAINED})


def of_modelopt(name: str, folder: Path) -> Path:
    """In FP8 with a scale a matrix and one for activations; a file of its own declares it."""
    plain = make(name, folder / name / "bf16")
    converted = folder / name / "fp8_tensor"
    octavo.convert(plain, converted, "fp8_tensor", prove=False)
    stored = tensors_of(converted)
    for scale in [name for name in stored if name.endswith(".weight_scale")]:
        stored[scale] = stored[scale].reshape(())
        stored[scale.replace(".weight_scale", ".input_scale")] = stored[scale].clone()
    source = write_checkpoint(folder / name / "fp8", stored, config=json.loads((plain / "config.json").read_text()))
    declared = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": declared}))
    return source


def test_parameters_equal_those_of_the_converted_checkpoint(tmp_path: Path) -> None:
    deepseek, qwen = in_blocks("deepseek_v3", tmp_path), in_blocks("qwen3_moe", tmp_path)
    cases = [
        (deepseek, "fp8_channel"),
        (deepseek, "fp8_block"),
        (qwen, "fp8_channel"),
        (of_modelopt("llama", tmp_path), "fp8_channel"),
    ]
    pairs = [(octavo_job(source, scheme), Job(convert(source, scheme))) for source, scheme in cases]
    pairs[1] = Job(deepseek, {"quantization": "octavo_fp8_block"}), pairs[1][1]
    answers = load(*(job for pair in pairs for job in pair), timeout=550)
    for mine, stock in zip(answers[::2], answers[1::2], strict=True):
        for answer in (mine, stock):
            assert not answer.error, answer.error
        assert any("float8_e4m3fn" in digest for digest in stock.loaded.values())
        assert mine.loaded == stock.loaded
        assert mine.served == stock.served


def test_int8_stays_what_it_is(tmp_path: Path) -> None:
    """With scales in float32 that bf16 can't hold, as others write them."""
    plain, converted = make("llama", tmp_path / "bf16"), tmp_path / "int8"
    octavo.convert(plain, converted, "int8_channel", format="compressed-tensors-w8a8", prove=False)
    stored = tensors_of(converted)
    stored = {name: tensor * 1.001 if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    source = write_checkpoint(tmp_path / "others", stored, config=json.loads((converted / "config.json").read_text()))
    mine, stock = load(octavo_job(source, "int8_channel"), Job(source))
    for answer in (mine, stock):
        assert not answer.error, answer.error
    assert (mine.loaded, mine.served) == (stock.loaded, stock.served)


def test_blocks_stay_and_bf16_becomes_channels_where_no_scheme_is_named(tmp_path: Path) -> None:
    source, unnamed = in_blocks("llama", tmp_path), {"load_format": "octavo"}
    pairs = [(source, "fp8_block"), (source.parent / "bf16", "fp8_channel")]
    answers = load(*(job for path, scheme in pairs for job in (Job(path, unnamed), octavo_job(path, scheme))))
    for mine, named in zip(answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.error
        assert (mine.loaded, mine.served) == (named.loaded, named.served)
    layer = "model.layers.0.self_attn.o_proj.weight"
    assert answers[0].loaded[layer] == digest(tensors_of(source)[layer])


def test_new_weights_come_from_a_folder_in_fp8_or_in_bf16(tmp_path: Path) -> None:
    old, new = in_blocks("llama", tmp_path / "old"), in_blocks("llama", tmp_path / "new", seed=1)
    plain = new.parent / "bf16"
    ways = [["update", "disk", str(folder), [[]]] for folder in (new, plain, old)]
    mine, of_blocks, of_bf16 = load(octavo_job(old, steps=ways), octavo_job(new), octavo_job(plain), timeout=550)
    for answer in (mine, of_blocks, of_bf16):
        assert not answer.error, answer.error
    for (answers, now, in_place), expected in zip(mine.results, (of_blocks, of_bf16, mine), strict=True):
        assert answers == [[True, "Succeeded to update model weights."]]
        assert now == expected.served
        assert in_place
    assert of_blocks.served != of_bf16.served
