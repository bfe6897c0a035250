"""Packed weights that transformers has no place for, while it makes up those that it would have unpacked them to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...checkpoint.header import TensorInfo
from ...conversion.packing import PACKED, unpacked
from .model_plan import trace


def displaced(plain: Any, packed: Collection[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Packed weight -> what is wrong, for those of ``packed`` whose module takes its weight, but not packed.

    Args:
        plain: the model on meta, unquantized: what has no place there either is no fault of packing.
    """
    names = {name.removesuffix(PACKED): name for name in packed if name.endswith(PACKED)}
    infos = {name: info for name, there in names.items() if (info := unpacked(tensors[there], name)) is not None}
    wrong: dict[str, str] = {}
    for name, symbolic in trace(plain, infos, []).found.items() if infos else ():
        kind = type(plain.get_submodule(name.rpartition(".")[0])).__name__
        why = f"its {kind} has no place for packed weights, and would be initialized anew"
        wrong.update(dict.fromkeys((names[piece.src_name] for piece in symbolic.pieces), why))
    return wrong
