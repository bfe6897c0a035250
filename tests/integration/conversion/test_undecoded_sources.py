"""Checkpoints that are quantized already in a way that octavo can't decode: copied with a note, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import octavo
from helpers import write_checkpoint
from octavo.errors import RecipeError


def test_what_cant_be_decoded_is_copied_with_a_note(tmp_path: Path) -> None:
    stored = {"a.qweight": torch.zeros(4, 8, dtype=torch.int32), "a.scales": torch.ones(1, 8)}
    declared = {"quant_method": "gptq", "bits": 4}
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": declared})
    report = octavo.convert(tmp_path / "source", tmp_path / "out", None)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"quantization_config": declared}
    assert any("in a way that octavo can't decode: all tensors stay as they are" in note for note in report.notes)
    assert not any("unquantized" in note for note in report.notes)


PACKED_ROWS = {
    "a.weight_packed": torch.full((8, 16), -1, dtype=torch.int32),
    "a.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
}
NVFP4_PARTS = {
    "a.weight": torch.zeros(8, 16, dtype=torch.uint8),
    "a.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
    "a.weight_scale_2": torch.tensor(1.0),
}
CODES: dict[str, tuple[dict[str, Tensor], dict[str, object], str]] = {
    "GPTQ": (
        {"a.qweight": torch.zeros(4, 8, dtype=torch.int32), "a.scales": torch.ones(1, 8)},
        {"quant_method": "gptq", "bits": 4},
        "already quantized (gptq, says its config.json), in a way that octavo can't decode",
    ),
    "packed, of bits that nothing tells": (
        PACKED_ROWS,
        {},
        "a.weight_packed (I32) beside a.weight_scale), in a way",
    ),
    "scaled by its inputs": (
        {**NVFP4_PARTS, "a.pre_quant_scale": torch.ones(32)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
        "already quantized (modelopt, says its config.json), in a way that octavo can't decode (a.pre_quant_scale)",
    ),
    "int4 of ModelOpt": (
        {"a.weight": torch.zeros(4, 32, dtype=torch.uint8), "a.weight_scale": torch.ones(8, 1)},
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "already quantized (modelopt, says its config.json), in a way that octavo can't decode (modelopt 'W4A16_AWQ')",
    ),
    "a mixture of which not all is known": (
        NVFP4_PARTS,
        {
            **{"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
            "quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "W4A16_AWQ"}},
        },
        "already quantized (modelopt, says its config.json), in a way that octavo can't decode (modelopt 'W4A16_AWQ')",
    ),
}


@pytest.mark.parametrize("case", CODES)
def test_codes_that_octavo_can_not_decode_are_handed_to_nobody(case: str, tmp_path: Path) -> None:
    stored, declared, says = CODES[case]
    config = {"quantization_config": declared} if declared else {}
    write_checkpoint(tmp_path / "source", stored, config={"model_type": "llama", **config})
    for scheme in (None, "fp8_channel"):
        with pytest.raises(RecipeError) as error:
            octavo.stream(tmp_path / "source", scheme)
        assert says in str(error.value)
    report = octavo.convert(tmp_path / "source", tmp_path / "out", None)  # which copies, and says so
    for notes in (report.notes, octavo.plan(tmp_path / "source", None, model=False).notes):
        assert any("in a way that octavo can't decode" in n and "all tensors stay as they are" in n for n in notes)
    with pytest.raises(RecipeError, match="already quantized"):
        octavo.load(tmp_path / "source", None)


def test_weights_of_which_a_config_says_wrong_that_they_are_quantized_are_handed_out(tmp_path: Path) -> None:
    stored = {"a.weight": torch.ones(8, 8, dtype=torch.bfloat16)}
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert dict(octavo.stream(tmp_path / "source", None)).keys() == {"a.weight"}
