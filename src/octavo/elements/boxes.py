"""Boxes: which elements of a tensor are meant, which are still to come, and whether some tile it.

Boxes are compared, never counted. Offsets and sizes are in elements.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Box(NamedTuple):
    """``tensor[off : off + size]``."""

    off: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.off, self.size))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(map(slice, self.off, self.end))

    def region(self, tensor: Tensor) -> Tensor:
        """The view of a tensor that shows this box of it."""
        return tensor[self.slices]

    def holds(self, other: Box) -> bool:
        """Return True if all of ``other`` is in this box."""
        for a, n, b, m in zip(self.off, self.size, other.off, other.size):  # noqa: B905, SIM110  # asked a million times
            if b < a or b + m > a + n:
                return False
        return True

    def common(self, other: Box) -> Box | None:
        """Where both overlap."""
        off, size = [], []
        for a, n, b, m in zip(self.off, self.size, other.off, other.size):  # noqa: B905  # asked a million times
            low, high = a if a > b else b, a + n if a + n < b + m else b + m
            if low >= high:
                return None
            off.append(low)
            size.append(high - low)
        return Box(tuple(off), tuple(size))

    def without(self, other: Box) -> Iterator[Box]:
        """This box outside of ``other``, as disjoint boxes."""
        inner = self.common(other)
        if inner is None:
            yield self
            return
        if inner == self:
            return
        off, size = list(self.off), list(self.size)
        for axis, (low, high) in enumerate(zip(inner.off, inner.end, strict=True)):
            end = off[axis] + size[axis]
            if off[axis] < low:
                yield Box(
                    (*off[:axis], off[axis], *off[axis + 1 :]), (*size[:axis], low - off[axis], *size[axis + 1 :])
                )
            if high < end:
                yield Box((*off[:axis], high, *off[axis + 1 :]), (*size[:axis], end - high, *size[axis + 1 :]))
            off[axis], size[axis] = low, high - low

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.off, self.end, strict=True)) + "]"


class Gaps:
    """The boxes of a tensor that have not been written: disjoint, none when it is complete."""

    def __init__(self, shape: Sequence[int]) -> None:
        whole = Box.whole(shape)
        self.boxes = [whole] if whole.numel else []

    def __bool__(self) -> bool:
        return bool(self.boxes)

    def written(self, box: Box) -> Box | None:
        """A part of ``box`` that is no gap any more, or None."""
        if self._around(box) is not None:
            return None
        left = [box] if box.numel else []
        for gap in self.boxes:
            if not left:
                break
            left = [rest for part in left for rest in part.without(gap)]
        return left[0] if left else None

    def fill(self, box: Box) -> None:
        at = self._around(box)
        if at is not None and box.numel:  # as gaps don't meet, no other meets the box
            self.boxes = [*self.boxes[:at], *self.boxes[at].without(box), *self.boxes[at + 1 :]]
            return
        self.boxes = [rest for gap in self.boxes for rest in gap.without(box)] if box.numel else self.boxes

    def _around(self, box: Box) -> int | None:
        """The number of the gap that holds all of a box."""
        for index, gap in enumerate(self.boxes):
            if gap.holds(box):
                return index
        return None

    def __str__(self) -> str:
        shown = ", ".join(map(str, sorted(self.boxes)[:4]))
        return shown + (f" and {len(self.boxes) - 4} more" if len(self.boxes) > 4 else "")


# -- coverage ---------------------------------------------------------------------------------------------------------


class Filling(Protocol):
    """A box of a tensor, and the name of what fills it: a piece, say."""

    @property
    def box(self) -> Box: ...

    @property
    def src_name(self) -> str: ...


def coverage_problem(shape: Sequence[int], fillings: Sequence[Filling]) -> str | None:
    """Say why ``fillings`` don't tile ``shape`` exactly; None if they do."""
    problem = _coverage_problem(tuple(shape), tuple([filling.box for filling in fillings]))
    return None if problem is None else problem.text.format(*(fillings[index].src_name for index in problem.boxes))


class _Problem(NamedTuple):
    text: str  # with braces where names go
    boxes: tuple[int, ...]  # whose names these are


@functools.lru_cache(maxsize=256)
def _coverage_problem(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> _Problem | None:
    """Say why ``boxes`` don't tile ``shape``. It is remembered, since the layers of a model are alike."""
    whole = Box.whole(shape)
    for index, box in enumerate(boxes):
        if len(box.size) != len(shape) or not whole.holds(box):
            return _Problem(f"{{}} fills {box}, outside of {list(shape)}", (index,))
    order = sorted((index for index, box in enumerate(boxes) if box.numel), key=lambda index: boxes[index].off)
    beside: list[int] = []  # boxes that reach as far as the one in hand begins
    for index in order:
        box = boxes[index]
        if shape:
            beside = [other for other in beside if boxes[other].off[0] + boxes[other].size[0] > box.off[0]]
        for other in beside:
            if (common := box.common(boxes[other])) is not None:
                return _Problem(f"{{}} and {{}} both fill {common}", (index, other))
        beside.append(index)
    filled = sum(box.numel for box in boxes)
    if filled == whole.numel:
        return None
    text = f"{whole.numel - filled:,} of {whole.numel:,} elements come from no checkpoint tensor"
    gaps = Gaps(shape)
    for index in reversed(order):  # what is left lies before a box: the first gap
        gaps.fill(boxes[index])
    return _Problem(f"{text}: {gaps}" if filled else text, ())
