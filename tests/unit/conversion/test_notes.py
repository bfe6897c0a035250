"""What is said of who reads a conversion where nobody was asked."""

from __future__ import annotations

import pytest

from helpers import headers
from octavo.conversion import formats
from octavo.planning.recipe import Recipe

DENSE = {"m.0.mlp.up_proj.weight": (128, 128)}
EXPERTS = {f"m.0.mlp.experts.{number}.up_proj.weight": (128, 128) for number in range(2)}


def said(format: str, scheme: str, shapes: dict[str, tuple[int, int]], *, asked: bool = False) -> str:
    plan, *_ = formats.plan_for(headers(shapes), Recipe(scheme), format, 1 << 28, "cpu")
    assert {placement.scheme for placement in plan.quantized} == {scheme}
    return " ".join(formats.get(format).notes(plan, asked))


@pytest.mark.parametrize("format", formats.NAMES)
def test_experts_that_transformers_misreads_or_refuses_are_named(format: str) -> None:
    right = {"fp8": {"fp8_block"}, "compressed-tensors": {"fp8_channel", "fp8_tensor", "int8_channel"}}
    for scheme in formats.get(format).schemes:
        expected = scheme not in right.get(format, ())
        note = f"can't read {scheme} experts in {format} checkpoints"
        assert (note in said(format, scheme, DENSE | EXPERTS)) == expected
        assert not said(format, scheme, DENSE)
        assert not said(format, scheme, DENSE | EXPERTS, asked=True)
