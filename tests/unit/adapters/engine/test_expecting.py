"""Shapes that a tensor may be expected in, by what the checkpoint has beside it."""

from __future__ import annotations

from octavo.adapters.engine.expecting import likely_shapes

ATTENTION = {"l.0.attn.q.weight": (8, 6), "l.0.attn.k.weight": (2, 6), "l.0.attn.v.weight": (2, 6)}
EXPERTS = {
    f"l.0.experts.{number}.{kind}.weight": shape
    for number in range(3)
    for kind, shape in (("gate", (4, 6)), ("up", (4, 6)), ("down", (6, 4)))
}
SHAPES = {**ATTENTION, **EXPERTS, "l.0.norm.weight": (6,)}


def test_what_is_turned_is_expected_the_other_way_round_before_all_else() -> None:
    assert next(likely_shapes("l.0.attn.qkv.weight", (6, 12), SHAPES)) == (12, 6)
    assert next(likely_shapes("l.0.experts.gate_up", (3, 6, 8), SHAPES)) == (3, 8, 6)


def test_what_has_too_few_rows_is_expected_with_those_of_all_parts() -> None:
    assert (12, 6) in likely_shapes("l.0.attn.qkv.weight", (11, 6), SHAPES)
    assert (3, 8, 6) in likely_shapes("l.0.experts.gate_up", (3, 7, 6), SHAPES)


def test_where_nothing_is_near_nothing_is_expected() -> None:
    assert not [*likely_shapes("other.qkv.weight", (6, 12), SHAPES)]
