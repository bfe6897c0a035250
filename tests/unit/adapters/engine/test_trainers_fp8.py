"""FP8 that a trainer sends to an engine, in another form than conversions have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import same_bytes, write_checkpoint
from octavo.adapters.engine.trainers_fp8 import TrainersFp8
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.errors import CoverageError
from octavo.numerics import schemes
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe

NAME, LAYOUT = "mlp.up_proj.weight", formats.get("compressed-tensors")
VALUES = torch.randn(256, 384, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def joiner(folder: Path, scheme: str, **options: Any) -> TrainersFp8:
    tensors = {NAME: VALUES.bfloat16(), "other.weight": VALUES.bfloat16()}
    plan = plan_checkpoint(Checkpoint.open(write_checkpoint(folder, tensors)), Recipe(scheme))
    placements = {placement.name: placement for placement in plan.placements}
    return TrainersFp8(placements, **{"layout": LAYOUT, "copied": False, "limit_bytes": 1 << 30, **options})


def in_blocks() -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of blocks, and what they stand for."""
    codes, scale = schemes.quantize(VALUES, "fp8_block")
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes, scale, codes.float() * wide


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scheme", ["fp8_channel", "int8_channel", "nvfp4"])
def test_blocks_are_what_they_stand_for_where_the_model_holds_something_else(
    scheme: str, backwards: bool, tmp_path: Path
) -> None:
    codes, scale, values = in_blocks()
    sent = [(NAME, codes), (f"{NAME}_scale_inv", scale)]
    (found,) = joiner(tmp_path, scheme).joined(sent[::-1] if backwards else sent)
    assert found[0] == NAME
    assert same_bytes(found[1], values)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("layout", ["compressed-tensors", "compressed-tensors-w8a8"])
def test_rows_that_are_called_as_conversions_have_them_are_known_by_their_numbers(
    layout: str, backwards: bool, tmp_path: Path
) -> None:
    """A scale of int8 has the name and the shape of one of FP8."""
    codes, scale = schemes.quantize(VALUES, "fp8_channel")
    joins = joiner(tmp_path, "int8_channel", layout=formats.get(layout))
    sent = [(NAME, codes), (f"{NAME}_scale", scale)]
    (found,) = joins.joined(sent[::-1] if backwards else sent)
    assert found[0] == NAME
    assert same_bytes(found[1], codes.float() * scale)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("layout", ["compressed-tensors", "compressed-tensors-w8a8"])
def test_int8_of_conversions_is_handed_on_as_soon_as_both_are_there(
    layout: str, backwards: bool, tmp_path: Path
) -> None:
    """What waited for the end of a call would keep every layer of an engine open until then."""
    joins = joiner(tmp_path, "int8_channel", layout=formats.get(layout))
    placement = joins.placements[NAME]
    numbers, scale = (NAME + "_packed" * joins.layout.packs(placement.scheme), VALUES.to(torch.int8)), VALUES[:, :1]
    sent = [numbers, (f"{NAME}_scale", scale)]
    found = [name for name, _ in joins.joined([*(sent[::-1] if backwards else sent), ("x", VALUES)])]
    assert found == [numbers[0], f"{NAME}_scale", "x"]


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_blocks_pass_through_where_the_model_holds_them(suffix: str, tmp_path: Path) -> None:
    codes, scale, _ = in_blocks()
    found = dict(joiner(tmp_path, "fp8_block").joined([(NAME, codes), (f"{NAME}{suffix}", scale)]))
    assert same_bytes(found.pop(NAME), codes)
    assert same_bytes(found.pop(f"{NAME}_scale"), scale)
    assert not found


def test_a_scale_a_row_passes_through_in_another_shape(tmp_path: Path) -> None:
    codes, scale = schemes.quantize(VALUES, "fp8_channel")
    found = dict(joiner(tmp_path, "fp8_channel").joined([(NAME, codes), (f"{NAME}_scale", scale.flatten())]))
    assert same_bytes(found[NAME], codes)
    assert same_bytes(found[f"{NAME}_scale"], scale)


def test_what_conversions_have_is_handed_on_as_it_comes(tmp_path: Path) -> None:
    """Also what comes without its scale, or its scale without it, which a later call may bring."""
    codes, scale = schemes.quantize(VALUES, "fp8_channel")
    sent = [
        (NAME, codes),
        ("x", VALUES),
        (f"{NAME}_scale", scale),
        ("other.weight_scale", scale),
        ("other.weight", codes),
    ]
    found = list(joiner(tmp_path, "fp8_channel").joined(sent))
    assert {name: id(tensor) for name, tensor in found} == {name: id(tensor) for name, tensor in sent}
    assert [name for name, _ in found[:3]] == ["x", NAME, f"{NAME}_scale"]


def test_what_an_iterator_writes_over_is_copied(tmp_path: Path) -> None:
    codes, scale, values = in_blocks()
    memory = codes.clone()

    def sent() -> Any:
        yield NAME, memory
        memory.view(torch.uint8).zero_()
        yield f"{NAME}_scale_inv", scale

    (found,) = joiner(tmp_path, "fp8_channel", copied=True).joined(sent())
    assert same_bytes(found[1], values)


def test_no_more_waits_than_there_is_room_for(tmp_path: Path) -> None:
    codes, _, _ = in_blocks()
    found = joiner(tmp_path, "fp8_channel", copied=True, limit_bytes=1).joined(
        [(NAME, codes), ("other.weight", codes), ("x", VALUES)]
    )
    assert [name for name, _ in found] == [NAME, "x", "other.weight"]


def test_scales_that_fit_nothing_are_refused_by_name(tmp_path: Path) -> None:
    codes, scale, _ = in_blocks()
    with pytest.raises(CoverageError, match=rf"{NAME}_scale_inv is \[3, 3\]"):
        list(joiner(tmp_path, "fp8_channel").joined([(NAME, codes), (f"{NAME}_scale_inv", scale.new_ones(3, 3))]))


def test_two_scales_of_a_weight_are_refused_by_name(tmp_path: Path) -> None:
    _, scale, _ = in_blocks()
    sent = [(f"{NAME}_scale_inv", scale), (f"{NAME}_scale", scale)]
    with pytest.raises(CoverageError, match=f"{NAME} has two scales: {NAME}_scale_inv and {NAME}_scale"):
        list(joiner(tmp_path, "fp8_channel").joined(sent))
