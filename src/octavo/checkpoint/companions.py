"""What stands beside the stored numbers of a quantized weight, by the names that formats give it.

Names are those within a module: of ``model.up.weight_scale``, the module is ``model.up``. Modules of a model are alike,
so what is asked of one is remembered for all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

#: what a scale is called, beside numbers N: N + this
_SUFFIXES = ("_scale_inv", "_scale", "_weight_scale")
#: or beside a weight, without its name
_BESIDE_WEIGHT = ("scale", "qscale_weight", "scale_weight")
#: a scale of the scales of a matrix, and whether it divides them
_GLOBAL = {"_scale_2": False, "_weight_scale_2": False, "_global_scale": True}
_ZERO_POINT, _SHAPE = "_zero_point", "_shape"
#: scales of activations, which nobody needs who has weights in another format; with the name of the numbers, or without
_ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "act_scale",
)
_MORE_ACTIVATIONS = ("qscale_act", "scale_input", "scale_activation", "input_scale_ub")
#: columns are in another order, or scaled before they meet the weight; or something is added to it
_UNDECODED = ("_g_idx", "_pre_quant_scale")
_UNDECODED_MODULE = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
#: what may be a scale, and has to have its weight
_ENDS = (*_SUFFIXES, *_GLOBAL, _ZERO_POINT)
#: scales of caches and of attention, in any module
CACHES = frozenset(
    ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point")
)


class Companions(NamedTuple):
    """Names, within their module, of what makes a weight."""

    weight: str
    scales: tuple[str, ...]  # of which there should be one
    zero_point: str | None
    global_scales: tuple[tuple[str, bool], ...]  # at most one; and whether it divides the scales
    shape: str | None
    activations: tuple[str, ...]  # scales of activations


@functools.lru_cache(maxsize=1024)
def companions(numbers: str, names: frozenset[str]) -> Companions | None:
    """What stands beside numbers in a module with these names; None if there is no scale, or what can't be decoded."""
    stem, scales = _stem(numbers), _scales(numbers)
    activations = [f"{stem}_{end}" for end in _ACTIVATIONS]
    if stem == "weight":
        activations += [*_ACTIVATIONS, *_MORE_ACTIVATIONS]
    found = tuple(name for name in scales if name in names)
    if not found or undecoded(numbers, names):
        return None
    return Companions(
        stem,
        found,
        stem + _ZERO_POINT if stem + _ZERO_POINT in names else None,
        tuple((stem + end, divides) for end, divides in _GLOBAL.items() if stem + end in names),
        stem + _SHAPE if stem + _SHAPE in names else None,
        tuple(name for name in activations if name in names),
    )


def is_alone(numbers: str, names: frozenset[str]) -> bool:
    """Return True if no scale of theirs is in the module, and nothing that makes them numbers that can't be decoded."""
    return not any(name in names for name in _scales(numbers)) and not undecoded(numbers, names)


def _stem(numbers: str) -> str:
    return numbers.removesuffix("_packed").removesuffix("_blocks")


def _scales(numbers: str) -> list[str]:
    """What the scale of these numbers may be called."""
    stem = _stem(numbers)
    found = [stem + end for end in (("_scales",) if numbers.endswith("_blocks") else _SUFFIXES)]
    return [*found, *_BESIDE_WEIGHT] if stem == numbers == "weight" else found


def undecoded(numbers: str, names: frozenset[str]) -> str | None:
    """What stands beside numbers, and makes of them what can't be decoded."""
    stem = _stem(numbers)
    return next((name for name in (*(stem + end for end in _UNDECODED), *_UNDECODED_MODULE) if name in names), None)


def of_weight(name: str) -> str | None:
    """The weight whose scale, or zero point, is called so; None for what is none."""
    leaf = name.rpartition(".")[2]
    ends = _ENDS if leaf.startswith("weight_") else ("_proj_scale_inv", "_proj_scale")
    if not leaf.endswith(ends):
        return None
    return name[: -max(len(end) for end in _ENDS if name.endswith(end))]
