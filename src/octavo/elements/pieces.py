"""Where every element of a parameter comes from: boxes of it that equal strided views of checkpoint tensors.

A `Piece` says that a box of a parameter equals a strided view of one checkpoint tensor. A parameter's pieces tile it.

Offsets, sizes and strides are in elements.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from .boxes import Box


class Piece(NamedTuple):
    """``parameter[dst_off : dst_off + size] == as_strided(source.flatten(), size, src_strides, src_off)``."""

    dst_off: tuple[int, ...]
    size: tuple[int, ...]
    src_name: str
    src_off: int
    src_strides: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box of the parameter that it fills."""
        return Box(self.dst_off, self.size)

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def dst_end(self) -> tuple[int, ...]:
        return tuple(map(operator.add, self.dst_off, self.size))

    def region(self, parameter: Tensor) -> Tensor:
        """The view of ``parameter`` that this piece fills."""
        return parameter[tuple(slice(off, off + n) for off, n in zip(self.dst_off, self.size, strict=True))]

    def narrow(self, dim: int, start: int, length: int) -> Piece:
        """The part of this piece at [start, start + length) of ``dim``, counted from the piece's own beginning."""
        return self._replace(
            dst_off=put_at(self.dst_off, dim, self.dst_off[dim] + start),
            size=put_at(self.size, dim, length),
            src_off=self.src_off + start * self.src_strides[dim],
        )

    def permute(self, dims: Sequence[int]) -> Piece:
        """The same elements with the parameter's axes reordered."""
        return self._replace(
            dst_off=tuple(self.dst_off[d] for d in dims),
            size=tuple(self.size[d] for d in dims),
            src_strides=tuple(self.src_strides[d] for d in dims),
        )

    def file_order(self) -> tuple[int, ...]:
        """Axes from the outermost in the file to the innermost."""
        return _file_order(self.src_strides)

    @property
    def run_length(self) -> int:
        """Elements of the contiguous stretches of the source that hold this piece: all of them where it is one."""
        return _run(self.size, self.src_strides)[0]

    def runs(self) -> tuple[int, Iterator[int]]:
        """The contiguous stretches of the source that hold this piece: their length, and their offsets in file order.

        Read one after another into a buffer, the stretches form a contiguous tensor whose axes are `file_order`.
        """
        length, outer = _run(self.size, self.src_strides)
        if not length:
            return 0, iter(())
        return length, (self.src_off + sum(steps) for steps in itertools.product(*outer))


# a model has thousands of pieces, and few shapes of them


@functools.lru_cache(maxsize=4096)
def _file_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda d: (-strides[d], d)))


@functools.lru_cache(maxsize=4096)
def _run(size: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, tuple[range, ...]]:
    """The longest contiguous stretch of a box, and the offsets along its other axes."""
    if not math.prod(size):
        return 0, ()
    order = [d for d in _file_order(strides) if size[d] > 1]
    length = 1
    while order and strides[order[-1]] == length:
        length *= size[order.pop()]
    return length, tuple(range(0, size[d] * strides[d], strides[d]) for d in order)


def put_at(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


@functools.lru_cache(maxsize=4096)
def packed_strides(size: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without holes, of axes in the same order in memory."""
    packed, stride = list(strides), 1
    for axis in reversed(_file_order(strides)):
        if size[axis] != 1:
            packed[axis] = stride
            stride *= size[axis]
    return tuple(packed)


def whole(name: str, shape: Sequence[int]) -> Piece:
    """The piece that makes a parameter out of all of one tensor, unchanged."""
    return Piece((0,) * len(shape), tuple(shape), name, 0, contiguous_strides(shape))


def coverage_problem(shape: Sequence[int], pieces: Sequence[Piece]) -> str | None:
    """What keeps ``pieces`` from tiling ``shape`` exactly, or None. Boxes are compared, not counts."""
    if len(pieces) == 1 and pieces[0].size == shape and not any(pieces[0].dst_off):
        return None
    if _tiles(tuple(shape), tuple((piece.dst_off, piece.size) for piece in pieces)):
        return None
    return _describe_problem(shape, pieces)


@functools.lru_cache(maxsize=256)
def _tiles(shape: tuple[int, ...], boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> bool:
    """Whether they tile it; the layers of a model are alike."""
    return _describe_problem(shape, [Piece(off, size, "", 0, ()) for off, size in boxes]) is None


def _describe_problem(shape: Sequence[int], pieces: Sequence[Piece]) -> str | None:
    """As `coverage_problem`, looked at anew."""
    for piece in pieces:
        inside = len(piece.size) == len(shape) and all(
            off >= 0 and end <= n for off, end, n in zip(piece.dst_off, piece.dst_end, shape, strict=True)
        )
        if not inside:
            return f"{piece.src_name} fills {_box(piece)}, outside of {list(shape)}"
    open_boxes: list[Piece] = []
    for piece in sorted((p for p in pieces if p.numel), key=lambda p: p.dst_off):
        if shape:
            open_boxes = [other for other in open_boxes if other.dst_end[0] > piece.dst_off[0]]
        for other in open_boxes:
            if all(
                a < b_end and b < a_end
                for a, a_end, b, b_end in zip(piece.dst_off, piece.dst_end, other.dst_off, other.dst_end, strict=True)
            ):
                return f"{piece.src_name} and {other.src_name} both fill {_box(piece)}"
        open_boxes.append(piece)
    filled = sum(piece.numel for piece in pieces)
    if filled != math.prod(shape):
        return f"{math.prod(shape) - filled:,} of {math.prod(shape):,} elements come from no checkpoint tensor"
    return None


def _box(piece: Piece) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(piece.dst_off, piece.dst_end, strict=True)) + "]"
