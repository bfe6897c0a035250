"""What loaders are given for weights that are quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.coded import coding_of, encoded, write_coded
from octavo.adapters.engine.given import Given
from octavo.checkpoint.codings import Decoding
from octavo.conversion import formats
from octavo.numerics import schemes
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_scales_that_pass_through_keep_their_dtype_whatever_those_of_other_weights_are(
    first: torch.dtype, tmp_path: Path
) -> None:
    """In packed int8, where they are as they come; matrices of one shape."""
    other = torch.float32 if first == torch.bfloat16 else torch.bfloat16
    dtypes = {"a.weight": first, "b.weight": other}
    sources = {}
    for name, dtype in dtypes.items():
        coding = coding_of(name, (8, 16), Decoding("int8", 1, None))
        parts = encoded(coding, 0)
        sources[name] = coding, {**parts, "scale": parts["scale"].to(dtype)}
    plan = plan_checkpoint(write_coded(tmp_path, sources)[0], Recipe("int8_channel"))
    assert all(placement.passed for placement in plan.placements)
    given = Given(formats.get("compressed-tensors"), schemes.get("int8_channel"))
    found = {source.name: source.dtype for placement in plan.placements for source in given.sources(placement)}
    assert {name: found[f"{name}_scale"] for name in dtypes} == dtypes


def test_scales_are_float32_only_where_they_pass_through(tmp_path: Path) -> None:
    """Of two matrices of one shape, whose scales have one dtype, another is quantized anew."""
    sources = {}
    for name, group in {"a.weight": None, "b.weight": 8}.items():
        coding = coding_of(name, (8, 16), Decoding("int8", 1, group))
        parts = encoded(coding, 0)
        sources[name] = coding, {**parts, "scale": parts["scale"].float()}
    plan = plan_checkpoint(write_coded(tmp_path, sources)[0], Recipe("int8_channel"))
    assert [placement.passed for placement in plan.placements] == [True, False]
    given = Given(formats.get("compressed-tensors"), schemes.get("int8_channel"))
    found = {source.name: source.dtype for placement in plan.placements for source in given.sources(placement)}
    assert [found[f"{name}_scale"] for name in sources] == [torch.float32, torch.bfloat16]
