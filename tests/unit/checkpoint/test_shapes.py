"""The number of columns of packed weights, where no header tells it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import octavo
from helpers import same_bytes, write_checkpoint
from helpers.folders import tensors_of
from helpers.quantized import stored
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.codings import Decoding
from octavo.errors import CheckpointError
from octavo.numerics import schemes

CONFIG = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
        },
    }
}


def write(folder: Path, shape: torch.Tensor, shards: int = 1) -> torch.Tensor:
    """A checkpoint with 13 words a row that says it has a weight of this shape; returns what is in 101 columns."""
    held = stored((24, 101), Decoding("int4_in_int32", 1, None), torch.bfloat16, 0, zeros=False)
    tensors = {
        "a.up.weight_packed": held.codes,
        "a.up.weight_scale": held.scale,
        "a.up.weight_shape": shape,
        "a.norm.weight": torch.ones(24, dtype=torch.bfloat16),
    }
    write_checkpoint(folder, tensors, shards, CONFIG)
    return held.weight


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shards", [1, 4])
def test_the_number_of_columns_is_that_which_is_stored(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    weight = write(tmp_path / "source", torch.tensor([24, 101], dtype=dtype), shards)
    assert Checkpoint.open(tmp_path / "source").decoded().tensors["a.up.weight"].shape == (24, 101)
    octavo.convert(tmp_path / "source", tmp_path / "bf16", scheme=None)
    assert same_bytes(tensors_of(tmp_path / "bf16")["a.up.weight"], weight.bfloat16())
    octavo.convert(tmp_path / "source", tmp_path / "fp8")
    found = tensors_of(tmp_path / "fp8")
    q, scale = schemes.quantize(weight, "fp8_channel")
    assert same_bytes(found["a.up.weight"], q)
    assert same_bytes(found["a.up.weight_scale"], scale)


def test_shapes_that_lie_together_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, tensors = {}, {}
    for number, columns in enumerate((101, 98, 104, 97)):
        held = stored((24, columns), Decoding("int4_in_int32", 1, None), torch.bfloat16, number, zeros=False)
        parts = {"packed": held.codes, "scale": held.scale, "shape": torch.tensor([24, columns])}
        tensors.update({f"{number}.up.weight_{part}": tensor for part, tensor in parts.items()})
        wanted[f"{number}.up.weight"] = (24, columns)
    checkpoint, reads = Checkpoint.open(write_checkpoint(tmp_path, tensors, 1, CONFIG)), []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or read(*args))
    decoded = checkpoint.decoded()
    assert {name: info.shape for name, info in decoded.tensors.items()} == wanted
    assert sum(nbytes > 0 for _, nbytes, _ in reads) == 1


WRONG = [
    torch.tensor([24, 105]),
    torch.tensor([24, 96]),
    torch.tensor([23, 101]),
    torch.tensor([101]),
    torch.tensor([], dtype=torch.int64),
    torch.tensor([24, -101]),
    torch.tensor([1, 24, 101]),
    torch.tensor([24.0, 101.0]),
]


@pytest.mark.parametrize("shape", WRONG)
def test_a_shape_that_the_numbers_can_not_have_is_an_error(shape: torch.Tensor, tmp_path: Path) -> None:
    write(tmp_path, shape)
    with pytest.raises(
        CheckpointError, match=r"a\.up\.weight_shape says .*, and a\.up\.weight_packed holds \[24, 13\]"
    ):
        Checkpoint.open(tmp_path).decoded()


GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def test_a_shape_that_contradicts_the_groups_is_an_error(tmp_path: Path) -> None:
    held = stored((24, 128), Decoding("int4_in_int32", 1, 32), torch.bfloat16, 0, zeros=False)
    config = json.loads(json.dumps(CONFIG))
    config["quantization_config"]["config_groups"]["g"]["weights"] = GROUPS
    for shape in ([24, 128], [24, 126], [24, 96], [12, 128]):
        tensors = {"a.weight_packed": held.codes, "a.weight_scale": held.scale, "a.weight_shape": torch.tensor(shape)}
        checkpoint = Checkpoint.open(write_checkpoint(tmp_path / str(shape), tensors, 1, config))
        if shape[1] > 120 and shape[0] == 24:  # the last word need not be full
            assert list(checkpoint.decoded().tensors["a.weight"].shape) == shape
            continue
        with pytest.raises(CheckpointError, match=r"a\.weight_shape says .*, and a\.weight_packed holds \[24, 16\]"):
            checkpoint.decoded()


def test_a_shape_that_has_other_groups_than_scales_is_an_error(tmp_path: Path) -> None:
    held = stored((24, 40), Decoding("int4_in_int32", 1, 4), torch.bfloat16, 0, zeros=False)
    config = json.loads(json.dumps(CONFIG))
    config["quantization_config"]["config_groups"]["g"]["weights"] = {**GROUPS, "group_size": 4}
    tensors = {"a.weight_packed": held.codes, "a.weight_scale": held.scale, "a.weight_shape": torch.tensor([24, 36])}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors, 1, config))
    said = r"a\.weight_shape says \[24, 36\], and a\.weight_scale holds 10 groups of 4 columns"
    with pytest.raises(CheckpointError, match=said):
        checkpoint.decoded()
