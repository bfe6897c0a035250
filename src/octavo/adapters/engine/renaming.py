"""Tensors by other names than the checkpoint's, or fused: which tensors of the checkpoint they hold. Imports no engine.

A loader that takes both puts them in the same places. Where a dry run has shown which elements go where for either, the
one is known as a view of the other, and nothing is guessed from names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ...elements.dry_run import Copy
from ...elements.pieces import contiguous_strides


class Part(NamedTuple):
    """A tensor of the checkpoint, as a view of another tensor's elements in order."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def parts_of(
    copies: Sequence[Copy],
    shape: tuple[int, ...],
    known: Mapping[str, Sequence[Copy]],
    shapes: Mapping[str, tuple[int, ...]],
    count: Callable[[str], int],
) -> list[Part] | None:
    """The tensors of the checkpoint that a tensor holds, by where a loader puts all of them.

    Args:
        copies: of the tensor of this shape.
        known: tensor of the checkpoint -> its copies.
        count: gives how many matrices the checkpoint has where one of it is.

    Returns:
        In the order in which they lie in it; None where it is anything but whole tensors of the checkpoint. Of a
        stack that has as many as the checkpoint, matrices may be left out: another rank's experts.
    """
    numel = math.prod(shape)
    by_target: dict[str, list[Copy]] = {}
    for copy in copies:
        by_target.setdefault(copy.target, []).append(copy)
    found: list[Part] = []
    accounted = 0
    for name, theirs in known.items():
        if not any(copy.target in by_target for copy in theirs):
            continue
        views = {_within(copy, by_target.get(copy.target, ()), name, shapes[name]) for copy in theirs}
        if views == {None}:  # it lies beside, in the same parameter
            continue
        view, *others = views
        if others or view is None or not _fits(view, numel):
            return None
        found.append(view)
        accounted += sum(math.prod(copy.box.size) for copy in theirs)
    found.sort(key=lambda part: part.offset)
    if not _holds_whole_matrices(found, shape, count):
        return None  # rows, columns or matrices are left over
    return found if found and accounted == sum(math.prod(copy.box.size) for copy in copies) else None


def _holds_whole_matrices(parts: Sequence[Part], shape: tuple[int, ...], count_of: Callable[[str], int]) -> bool:
    """Return True if parts cover each matrix of a stack as a whole, or not at all; a tensor of fewer axes is one."""
    matrix = math.prod(shape[1:] if len(shape) > 2 else shape)
    covered: dict[int, int] = {}
    for part in parts:
        count = part.shape[0] if len(part.shape) == len(shape) > 2 else 1
        for number in range(count):
            index = part.offset // matrix + number
            covered[index] = covered.get(index, 0) + math.prod(part.shape) // count
    if covered and len(covered) < math.prod(shape) // matrix != count_of(parts[0].name):
        return False
    return all(numel == matrix for numel in covered.values())


def _fits(part: Part, numel: int) -> bool:
    last = part.offset + sum((n - 1) * stride for n, stride in zip(part.shape, part.strides, strict=True))
    return part.offset >= 0 and last < numel


def _within(copy: Copy, outer: Sequence[Copy], name: str, shape: tuple[int, ...]) -> Part | None:
    """The tensor of which ``copy`` is a part, as a view of the one whose copy covers the same elements."""
    for other in outer:
        inner, around = copy.box, other.box
        axes = zip(around.off, inner.off, inner.size, around.size, strict=True)
        if all(first <= at and at + n <= first + extent for first, at, n, extent in axes):
            return _aligned(copy, other, name, shape)
    return None


def _aligned(copy: Copy, other: Copy, name: str, shape: tuple[int, ...]) -> Part | None:
    if copy.view is None or other.view is None:
        return None
    step_of = {}  # stride in the target -> stride in the other tensor
    rest, start = copy.into.offset - other.into.offset, other.view.offset
    axes = sorted(zip(other.into.strides, other.view.strides, other.into.size, strict=True), reverse=True)
    for there, here, n in axes:
        if n > 1:
            step_of[there] = here
            count = rest // there
            rest, start = rest - count * there, start + count * here
    if rest:
        return None
    # the same axes, in the tensor of the checkpoint
    step_in = {
        mine: step_of.get(there)
        for there, mine, n in zip(copy.into.strides, copy.view.strides, copy.into.size, strict=True)
        if n > 1
    }
    strides, offset = [], copy.view.offset
    for n, mine in zip(shape, contiguous_strides(shape), strict=True):
        step = step_in.get(mine, 0 if n == 1 else None)
        if step is None:
            return None
        strides.append(step)
        start -= offset // mine * step
        offset %= mine
    return Part(name, shape, tuple(strides), start)
