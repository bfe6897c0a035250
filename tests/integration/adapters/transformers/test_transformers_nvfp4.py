"""Models in NVFP4: loaded, run, saved, updated and converted, with experts fused, apart and transposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _models import is_transposed, logits, make_checkpoint, relative_error

import octavo
from helpers.folders import tensors_of
from helpers.models import state_of
from octavo.numerics import schemes
from octavo.running.modules import quantized_weights, scale_name

transformers = pytest.importorskip("transformers")

SIDES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "qwen2_moe": {"hidden_size": 64, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 96},
}


@pytest.mark.parametrize("architecture", SIDES)
def test_a_model_in_four_bits_computes_with_the_values_of_its_numbers(architecture: str, tmp_path: Path) -> None:
    source = make_checkpoint(architecture, tmp_path / "source", **SIDES[architecture])
    model, plain = octavo.load(source, scheme="nvfp4"), octavo.load(source, scheme=None)
    found = dict(model.named_parameters())
    quantized = list(quantized_weights(model))
    assert {name for name, *_ in quantized} == {n for n, p in found.items() if p.dtype == torch.uint8}
    assert len(quantized) >= 12
    for name, scheme, parts in quantized:
        target = plain.get_parameter(name)
        weight = target.data.mT if is_transposed(model, name) else target.data
        q, scale = schemes.quantize(weight.contiguous(), scheme, parts)
        assert torch.equal(found[name], q), name
        assert torch.equal(found[scale_name(name)], scale), name
        values = schemes.dequantize(q, scale, scheme, parts, torch.bfloat16)
        target.data = values.mT.contiguous() if is_transposed(model, name) else values
    assert relative_error(logits(model), logits(plain)) < 0.02


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_a_model_in_four_bits_is_saved_loaded_and_updated(architecture: str, tmp_path: Path) -> None:
    source = make_checkpoint(architecture, tmp_path / "source", **SIDES[architecture])
    model = octavo.load(source, scheme="nvfp4")
    model.save_pretrained(tmp_path / "saved")
    wanted = state_of(model)
    config = octavo.OctavoConfig("nvfp4")
    auto = transformers.AutoModelForCausalLM
    for again in (
        octavo.load(tmp_path / "saved"),
        auto.from_pretrained(tmp_path / "saved"),
        auto.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16),
    ):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state_of(again).items())
    new = {name: tensor * 3 if name.endswith(".weight") else tensor for name, tensor in tensors_of(source).items()}
    octavo.update(model, new.items())
    for name, scheme, parts in quantized_weights(model):
        if name in new:
            q, scale = schemes.quantize(new[name], scheme, parts)
            assert torch.equal(model.get_parameter(name), q), name
            assert torch.equal(model.get_parameter(scale_name(name)), scale), name


def test_stock_transformers_reads_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    source = make_checkpoint("llama", tmp_path / "source", **SIDES["llama"])
    report = octavo.convert(source, tmp_path / "out", "nvfp4")
    assert any(note.startswith("proved: transformers") for note in report.notes)
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    logits(stock)  # which unpacks
    for name, tensor in tensors_of(source).items():
        if name.endswith("_proj.weight"):
            values = schemes.dequantize(*schemes.quantize(tensor, "nvfp4"), "nvfp4", dtype=torch.bfloat16)
            assert torch.equal(stock.get_parameter(name), values), name
