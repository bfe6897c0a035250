"""Shapes that a loader may expect of a tensor that holds others: fused, stacked, or both. They are to be tried."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

Shape = tuple[int, ...]
#: more kinds of tensors than a layer has
_MOST_KINDS = 12
_MOST_FUSED = 3


def likely_shapes(name: str, shape: Shape, shapes: Mapping[str, Shape]) -> Iterator[Shape]:
    """Shapes for a tensor that came with another one, by the tensors of the checkpoint (``shapes``) beside it."""
    found: dict[Shape, None] = {}
    kinds = _beside(name, shapes)
    for number in range(1, min(_MOST_FUSED, len(kinds)) + 1):
        for group in itertools.combinations(kinds, number):
            counts, trailing = {len(mine) for mine in group}, {mine[0][1:] for mine in group}
            if len(counts) > 1 or len(trailing) > 1 or not all(mine[0] for mine in group):
                continue
            joined = (sum(mine[0][0] for mine in group), *trailing.pop())
            count = counts.pop()
            whole = joined if count == 1 else (count, *joined)
            found[whole] = found[(*whole[:-2], *whole[:-3:-1])] = None
    yield from sorted(found.keys() - {shape}, key=lambda s: (len(s) != len(shape), sorted(s) != sorted(shape)))


def _beside(name: str, shapes: Mapping[str, Shape]) -> list[list[Shape]]:
    """The tensors in the same module, or in the nearest one around it: those of each kind, which are alike."""
    module = name
    while module := module.rpartition(".")[0]:
        kinds: dict[str, list[Shape]] = {}
        for other, shape in shapes.items():
            if other.startswith(f"{module}."):
                kinds.setdefault(re.sub(r"\d+", "*", other), []).append(shape)
        if kinds:
            alike = [found for found in kinds.values() if len(set(found)) == 1]
            return alike if len(kinds) <= _MOST_KINDS else []
    return []
