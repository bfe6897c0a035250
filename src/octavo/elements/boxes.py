"""Boxes: which elements of a tensor are meant, and which are still to come. They are compared, never counted.

Offsets and sizes are in elements.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """``tensor[off : off + size]``."""

    off: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.off, self.size))

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.off, self.end, strict=True))

    def holds(self, other: Box) -> bool:
        """Whether all of ``other`` is in this box."""
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
        """What of this box is outside of ``other``, as disjoint boxes."""
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
    """What of a tensor has not been written: disjoint boxes, none when it is complete."""

    def __init__(self, shape: Sequence[int]) -> None:
        whole = Box((0,) * len(shape), tuple(shape))
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
        """Which gap holds all of a box."""
        for index, gap in enumerate(self.boxes):
            if gap.holds(box):
                return index
        return None

    def __str__(self) -> str:
        shown = ", ".join(map(str, sorted(self.boxes)[:4]))
        return shown + (f" and {len(self.boxes) - 4} more" if len(self.boxes) > 4 else "")
