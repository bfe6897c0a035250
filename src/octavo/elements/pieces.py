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
        return self.box.region(parameter)

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

    def from_file_order(self, flat: Tensor) -> Tensor:
        """Elements in file order -> a tensor of the piece's size (a view)."""
        order = self.file_order()
        return flat.view([self.size[d] for d in order]).permute([order.index(d) for d in range(len(order))])

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
    offset, size, strides = _all_of(tuple(shape))
    return Piece(offset, size, name, 0, strides)


@functools.lru_cache(maxsize=4096)
def _all_of(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Offset, size and strides; a model has thousands of tensors, and some ten shapes."""
    return *Box.whole(shape), contiguous_strides(shape)
