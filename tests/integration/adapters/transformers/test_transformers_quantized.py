"""Models whose checkpoints are quantized already: as if octavo had loaded what these stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _models import logits, make_checkpoint, prompt

import octavo
from helpers import same_bytes, write_checkpoint
from helpers.coded import FINE_GRAINED, decoded, fine_grained
from helpers.folders import tensors_of
from helpers.stock import different, from_stock
from octavo.numerics import schemes

EXPERTS = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
RAGGED: dict[str, dict[str, Any]] = {
    "llama": {},
    "deepseek_v3": {"hidden_size": 144, "kv_lora_rank": 136, "n_group": 1, "moe_intermediate_size": 160, **EXPERTS},
}
#: transformers takes blocks that are cut at the edge of a matrix for smaller ones that are all alike
EVEN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4, **EXPERTS}
}


@pytest.fixture(scope="module", params=RAGGED | EVEN)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in FP8 blocks, and one in float32 of what it stands for."""
    root = tmp_path_factory.mktemp(request.param)
    plain = make_checkpoint(request.param, root / "bf16", **(RAGGED | EVEN)[request.param])
    config = json.loads((plain / "config.json").read_text())
    stored = fine_grained(tensors_of(plain))
    write_checkpoint(root / "fp8", stored, config={**config, "quantization_config": FINE_GRAINED})
    return root / "fp8", write_checkpoint(root / "float", decoded(stored), config=config)


def same(model: Any, reference: Any) -> bool:
    return not different(model, reference) and torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("scheme", ["fp8_channel", None])
def test_a_load_gives_the_model_of_what_is_decoded(folders: tuple[Path, Path], scheme: str | None) -> None:
    source, floats = folders
    reference = octavo.load(floats, scheme, dtype=torch.bfloat16)
    model = octavo.load(source, scheme, staging_bytes=2 << 20)
    assert same(model, reference)
    assert model.load_report.quantized == reference.load_report.quantized
    config = octavo.OctavoConfig(scheme)
    other = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert same(other, reference)
    assert torch.equal(*(each.generate(prompt(), max_new_tokens=3, do_sample=False) for each in (model, other)))


def test_blocks_stay_blocks_in_a_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    model = octavo.load(source, "fp8_block")
    report = model.load_report
    assert report.passed_through == report.quantized
    state, stored = model.state_dict(), tensors_of(source)
    codes = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} & state.keys()
    assert codes
    assert all(same_bytes(state[name], stored[name]) for name in codes)
    model.save_pretrained(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(saved, model)
    config = octavo.OctavoConfig()  # without a scheme
    unnamed = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert same(unnamed, model)
    assert unnamed.config.quantization_config.scheme == "fp8_block"
    assert config.scheme == "auto"  # and may be given for another model


@pytest.mark.parametrize("format", ["compressed-tensors", "compressed-tensors-w8a8"])
def test_a_conversion_to_int8_loads_as_what_it_was(format: str, tmp_path: Path) -> None:
    plain = make_checkpoint("llama", tmp_path / "plain")
    octavo.convert(plain, tmp_path / "int8", "int8_channel", format=format)
    first, again = octavo.load(plain, "int8_channel"), octavo.load(tmp_path / "int8")
    assert again.load_report.passed_through == again.load_report.quantized
    assert same(again, first)


def test_int8_with_scales_in_float32_stays_what_it_is_in_a_model(tmp_path: Path) -> None:
    """Scales that bf16 can't hold, as others write them."""
    plain = make_checkpoint("llama", tmp_path / "plain")
    octavo.convert(plain, tmp_path / "int8", "int8_channel", format="compressed-tensors-w8a8")
    stored = tensors_of(tmp_path / "int8")
    stored = {name: tensor * 1.001 if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    source = write_checkpoint(
        tmp_path / "source", stored, config=json.loads((tmp_path / "int8/config.json").read_text())
    )
    model = octavo.load(source)
    state = model.state_dict()
    assert all(same_bytes(state[name], tensor) for name, tensor in stored.items())
    # products of few rows and of many have these scales to bf16's precision
    reference = octavo.load(source, None)
    assert torch.allclose(logits(model).float(), logits(reference).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("folders", EVEN, indirect=True)
def test_it_is_decoded_as_transformers_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    model = octavo.load(source, None)
    assert same(model, from_stock(source))
    octavo.convert(source, tmp_path / "bf16", None)
    assert same(model, from_stock(tmp_path / "bf16"))


@pytest.mark.parametrize("folders", EVEN, indirect=True)
@pytest.mark.parametrize(("scheme", "format"), [("fp8_channel", "compressed-tensors"), ("fp8_block", "fp8")])
def test_stock_transformers_reads_what_is_made_of_it(
    folders: tuple[Path, Path], scheme: str, format: str, tmp_path: Path
) -> None:
    report = octavo.convert(folders[0], tmp_path / "out", scheme, format=format, reader="transformers")
    assert any(note.startswith("proved: transformers") for note in report.notes)
    assert torch.isfinite(logits(from_stock(tmp_path / "out"))).all()


def test_stacks_in_mxfp4_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    """gpt-oss has them [experts, out, in / 2] in the file, two a byte, and [experts, in, out] in its model."""
    plain = make_checkpoint("gpt_oss", tmp_path / "bf16", hidden_size=128, intermediate_size=96)
    config, stored = json.loads((plain / "config.json").read_text()), {}
    for name, tensor in tensors_of(plain).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, cols, rows = tensor.shape
            stored[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(115, 122, (experts, rows, cols // 32), dtype=torch.uint8)
        else:
            stored[name] = tensor
    declared = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    source = write_checkpoint(tmp_path / "source", stored, config={**config, "quantization_config": declared})
    stock = from_stock(source)
    assert same(octavo.load(source, None, staging_bytes=2 << 20), stock)
    octavo.convert(source, tmp_path / "out", None)
    assert same(from_stock(tmp_path / "out"), stock)
    assert octavo.verify(tmp_path / "out", against=source).ok
    state, wanted = octavo.load(source, "fp8_channel").state_dict(), stock.state_dict()
    for name in (name for name in stored if name.endswith("_blocks")):
        stack = name.removesuffix("_blocks")  # two bits of significand: FP8 holds them all
        found = schemes.dequantize(state[stack], state[f"{stack}_scale"], "fp8_channel", dtype=torch.bfloat16)
        assert same_bytes(found.mT, wanted[stack])
