"""Patterns of ignore that are about an engine's layers: what is said of those that match none."""

from __future__ import annotations

import pytest
from torch import nn

from octavo.adapters.engine.layers import LayerPatterns
from octavo.errors import RecipeError


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*.attn", "matches l.0.attn, which has no weights that become FP8"),
        ("*.proj.weight", "matches l.0.proj.weight, a part of l.0.proj, which stays as a whole"),
        ("*.experts.*.up_proj", "l.0.experts.0.up_proj.weight, one expert's, .* or none: ignore l.0.experts"),
        ("l.0.porj", "the nearest layer is 'l.0.proj'"),
    ],
)
def test_a_pattern_without_a_layer_is_told_what_it_matches_or_what_is_near(pattern: str, says: str) -> None:
    model = nn.ModuleDict({"attn": nn.Identity(), "proj": nn.Linear(2, 2, bias=False)})
    cut = {"l.0.experts.0.up_proj.weight": "l.0.experts"}
    patterns = LayerPatterns("an engine", [pattern])
    with pytest.raises(RecipeError, match=says):
        patterns.check(model, {"attn": "l.0.attn", "proj": "l.0.proj"}, ["l.0.q.weight"], lambda: cut, "here")
