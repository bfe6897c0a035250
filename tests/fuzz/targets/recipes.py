"""Recipes: made of dicts that came as JSON, and asked about the weights of a small model."""

from __future__ import annotations

import json
from typing import Any

import torch

from octavo.planning import kinds
from octavo.planning.recipe import Recipe, Weight

from ..mutator import Words
from .base import Target

_NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")
_GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"


class Recipes(Target):
    """The dict form of a recipe, as JSON; what is no JSON stands for the name of a scheme and for a pattern."""

    name = "recipes"
    share = 20
    words = Words(
        keys=("scheme", "targets", "ignore", "*.q_proj", "re:.*layers.*", *_NAMES),
        texts=(
            *("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8", "FP8_CHANNEL", "none", "*", "*.self_attn.*", "model"),
            *(
                "model.layers.?.*",
                "model.layers.[01].*",
                "re:model",
                r"re:.*\.(q|k)_proj",
                "re:(",
                "re:",
                r"re:\d{2,1}",
            ),
            *("re:(?i)LM_HEAD", "[", "[!", "[]", "re:[", "model.layers.0.mlp.gate_proj", *_NAMES),
        ),
    )

    def run(self, data: bytes) -> None:
        try:
            given: Any = json.loads(data)
        except (ValueError, RecursionError):
            given = data.decode("utf-8", "surrogateescape")
        recipe = Recipe.coerce(given, ignore=[given] if isinstance(given, str) else ())
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        assert again == recipe, f"a recipe is another one after JSON: {recipe} {again}"
        recipe.decide(_weights())


def _weights() -> list[Weight]:
    bf16 = torch.bfloat16
    weights = [Weight(name, (name,), bf16, kinds.LINEAR) for name in _NAMES]
    parts = tuple(_GATE_UP.replace("gate_up", part) for part in ("gate", "up"))
    weights.append(Weight(_GATE_UP, parts, bf16, kinds.LINEAR))
    weights.append(Weight("model.layers.0.mlp.experts.down_proj", ("e.0", "e.1"), torch.float32, kinds.EXPERTS))
    weights.append(Weight("model.norm.weight", ("model.norm.weight",), bf16, "vector"))
    weights.append(Weight("steps", ("steps",), torch.int64, "scalar"))
    return weights
