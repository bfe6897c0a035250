"""A view of a tensor, as boxes of it.

A loader narrows, chunks, transposes and views a parameter before it writes. All that is left of it when the write comes
are the view's offset, sizes and strides; a `Layout` turns them back into boxes of the parameter, and says which part of
the written values each box takes.

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
from .pieces import Piece


class NoBoxError(ValueError):
    """A view that boxes of the tensor can't express (overlapping elements, a tensor with holes)."""


class _Dim(NamedTuple):
    """An axis of a view: ``size`` elements, ``dst`` apart in the tensor, ``src`` apart in the written values."""

    size: int
    dst: int
    src: int


class Layout:
    """Shape and strides of a tensor; finds the boxes of it that its views are.

    Nearly all views that loaders make are one box whose axes are the tensor's own: these are found in a few
    microseconds, all others in some ten times as many.
    """

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.shape, self.strides = shape, strides
        #: axes with more than one element, outermost first: (axis, stride, extent)
        self._axes = [(d, strides[d], n) for d, n in enumerate(shape) if n > 1]
        self._axes.sort(key=lambda axis: -axis[1])
        self._axis_of = {step: axis for axis, step, _ in self._axes}
        self._is_dense = self._is_nested = 0 not in shape
        reach = 1  # elements from the first to beyond the last of the inner axes
        for _, step, extent in reversed(self._axes):
            self._is_dense &= step == reach
            self._is_nested &= step >= reach
            reach = extent * step

    def boxes(self, offset: int, sizes: Sequence[int], strides: Sequence[int], at_most: int | None = None) -> list[Box]:
        """The boxes that a view covers. Errors as for `pieces`."""
        return [piece.box for piece in self.pieces(offset, sizes, strides, (0,) * len(sizes), at_most=at_most)]

    def pieces(
        self,
        offset: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        src_strides: Sequence[int],
        src_off: int = 0,
        src_name: str = "",
        *,
        at_most: int | None = None,
    ) -> list[Piece]:
        """The boxes that a view covers, in order of the view, and where the values that are written to it come from.

        Args:
            offset, sizes, strides: of the view, the offset relative to the tensor's own.
            src_strides, src_off: of what is written to the view, axis by axis.

        Raises:
            NoBoxError: elements of the view coincide or lie outside of the tensor, or the tensor has holes and the view
                does not keep its axes, or there are more than ``at_most`` boxes.
        """
        if 0 in sizes:
            return []
        one = self._one_box(offset, sizes, strides, src_strides, src_off, src_name)
        if one is not None:
            return [one]
        if not self._is_dense:
            raise NoBoxError(f"shape {list(self.shape)} with strides {list(self.strides)} is not dense")
        dims = [_Dim(*dim) for dim in zip(sizes, strides, src_strides, strict=True) if dim[0] > 1]
        if any(dim.dst <= 0 for dim in dims):
            raise NoBoxError("the view repeats elements")
        if offset < 0 or offset + sum((dim.size - 1) * dim.dst for dim in dims) >= math.prod(self.shape):
            raise NoBoxError("the view reaches beyond the tensor")
        found = list(itertools.islice(self._decode(offset, _merged(dims), src_off), at_most and at_most + 1))
        if at_most is not None and len(found) > at_most:
            raise NoBoxError(f"the view is more than {at_most} boxes")
        return [Piece(tuple(start), tuple(size), src_name, shift, tuple(src)) for start, size, src, shift in found]

    def _one_box(
        self,
        offset: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        src_strides: Sequence[int],
        src_off: int,
        src_name: str,
    ) -> Piece | None:
        """The box of a view that keeps the tensor's axes, in whatever order; None for any other."""
        if offset < 0 or not self._is_nested:
            return None
        shape, axis_of = self.shape, self._axis_of
        start, size, src = [0] * len(shape), [1] * len(shape), [0] * len(shape)
        for axis, step, extent in self._axes:
            start[axis] = at = offset // step
            if at >= extent:
                return None
            offset -= at * step
        if offset:  # in a hole
            return None
        for n, step, src_step in zip(sizes, strides, src_strides, strict=True):
            if n > 1:
                found = axis_of.get(step, -1)
                if found < 0 or size[found] > 1 or start[found] + n > shape[found]:
                    return None
                size[found], src[found] = n, src_step
        return Piece(tuple(start), tuple(size), src_name, src_off, tuple(src))

    def _decode(self, offset: int, dims: Sequence[_Dim], shift: int) -> Iterator[_Found]:
        """Offsets, sizes and source strides along the axes, and the source offset, of each box."""
        start, rest = [0] * len(self.shape), offset
        for axis, step, _ in self._axes:
            start[axis], rest = divmod(rest, step)
        size, src = [1] * len(start), [0] * len(start)
        queue = list(dims)
        while queue:
            dim = queue.pop(0)
            axis, step, extent = next(found for found in self._axes if found[1] <= dim.dst)
            if dim.dst == step and size[axis] == 1 and start[axis] + dim.size <= extent:
                size[axis], src[axis] = dim.size, dim.src
                continue
            # where the next rows of an axis go on alike
            row = next((outer for _, outer, _ in reversed(self._axes) if outer > dim.dst and not outer % dim.dst), 0)
            count = row // dim.dst
            if 0 < count < dim.size and not dim.size % count and offset % row < dim.dst:
                rows = [_Dim(dim.size // count, row, dim.src * count), dim._replace(size=count)]
                queue = sorted([*rows, *queue], key=lambda d: -d.dst)
                continue
            others = [*(_Dim(size[a], s, src[a]) for a, s, _ in self._axes if size[a] > 1), *queue]
            if dim.dst != step or size[axis] > 1:  # every other row, say: each is a box of its own
                for k in range(dim.size):
                    yield from self._decode(offset + k * dim.dst, others, shift + k * dim.src)
                return
            # a run that goes on in the next row: what is left of this row, then whole rows, then the rest
            first = extent - start[axis] if start[axis] else dim.size // extent * extent
            for begin, count in ((0, first), (first, dim.size - first)):
                part = [*others, _Dim(count, step, dim.src)]
                ordered = sorted((d for d in part if d.size > 1), key=lambda d: -d.dst)
                yield from self._decode(offset + begin * step, ordered, shift + begin * dim.src)
            return
        yield start, size, src, shift


_Found = tuple[list[int], list[int], list[int], int]


@functools.lru_cache(maxsize=4096)
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    """The layout of a tensor; a model has thousands of them, and few that differ."""
    return Layout(shape, strides)


def trace_view(
    shape: Sequence[int],
    strides: Sequence[int],
    offset: int,
    sizes: Sequence[int],
    dst_strides: Sequence[int],
    src_strides: Sequence[int],
    src_off: int = 0,
    src_name: str = "",
) -> list[Piece]:
    """`Layout.pieces` for a tensor of that shape and with these strides."""
    return layout_of(tuple(shape), tuple(strides)).pieces(offset, sizes, dst_strides, src_strides, src_off, src_name)


# -- views of memory --------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """``as_strided`` of a tensor's memory, in elements."""

    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    def narrowed(self, start: Sequence[int], size: tuple[int, ...]) -> View:
        """A box of this view."""
        return View(self.offset + sum(map(operator.mul, start, self.strides)), size, self.strides)


def joined(made: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> list[tuple[Tensor, View]]:
    """Tensors, and where one after another is in what was made of them: as wide as they are, or one place each."""
    found, at = [], 0
    for tensor in tensors:
        if not tensor.numel():
            continue
        stacked = tensor.ndim < made.ndim
        part = made.select(dim, at) if stacked else made.narrow(dim, at, tensor.shape[dim])
        found.append((tensor, View.of(part)))
        at += 1 if stacked else tensor.shape[dim]
    return found


#: names of sources, views of them, and where these are put; none where that is not known
Seen = list[tuple[str, View, View]]
#: the most boxes that something rearranged may be
_PIECES = 16


class Image(NamedTuple):
    """What a loader has made to have elements of sources in another order, or together: a tensor, and its pieces."""

    layout: Layout
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, made: View, seen: Seen) -> Image | None:
        """The image of ``seen``, all that was put into ``made``; None where that is too much or can't be told."""
        layout = layout_of(made.size, made.strides)
        pieces: list[Piece] = []
        try:
            for name, view, (offset, size, strides) in seen:
                at = offset - made.offset
                pieces += layout.pieces(at, size, strides, view.strides, view.offset, name, at_most=_PIECES)
        except NoBoxError:
            return None
        return cls(layout, tuple(pieces)) if pieces else None

    def trace(self, shown: View, into: View) -> Seen:
        """Views of sources that ``shown``, a view of the made from its beginning, is together, and where ``into`` puts
        these."""
        offset, size, strides = shown
        try:
            found = self.layout.pieces(offset, size, strides, into.strides, into.offset, at_most=_PIECES)
        except NoBoxError:
            return []
        return [
            (piece.src_name, _source(piece, box), _source(part, box))
            for part in found
            for piece in self.pieces
            if (box := piece.box.common(part.box))
        ]


def _source(piece: Piece, box: Box) -> View:
    """Where a box within a piece comes from."""
    return View(piece.src_off, piece.size, piece.src_strides).narrowed(
        tuple(map(operator.sub, box.off, piece.dst_off)), box.size
    )


#: rows of a layout: more than any storage has
_ROWS = 1 << 48


def embed(sizes: Sequence[int], strides: Sequence[int], offset: int) -> tuple[tuple[int, ...], Box] | None:
    """A view of a storage as a box: of the dense layout of the storage that the view's strides describe.

    Returns:
        the strides of the layout, and the box; None where no layout shows the view as one (elements that coincide, axes
        that don't divide each other).
    """
    dims = _merged([_Dim(n, stride, stride) for n, stride in zip(sizes, strides, strict=True) if n > 1])
    layout = [dim.dst for dim in dims]
    if not layout or layout[-1] != 1:
        dims, layout = [*dims, _Dim(1, 1, 1)], [*layout, 1]
    if any(not inner or outer % inner for outer, inner in itertools.pairwise(layout)):
        return None
    start, rest = [], offset
    for step in layout:
        start.append(rest // step)
        rest %= step
    for at, dim, extent in zip(start[1:], dims[1:], _extents(layout)[1:], strict=True):
        if at + dim.size > extent:
            return None
    return tuple(layout), Box(tuple(start), tuple(dim.size for dim in dims))


def trace_in(
    layout: Sequence[int],
    sizes: Sequence[int],
    strides: Sequence[int],
    offset: int,
    src_strides: Sequence[int],
    src_off: int,
) -> list[Piece]:
    """`trace_view` of a view of a storage, in a layout of `embed`."""
    return trace_view(_extents(layout), layout, offset, sizes, strides, src_strides, src_off)


def _extents(layout: Sequence[int]) -> list[int]:
    return [_ROWS, *(outer // inner for outer, inner in itertools.pairwise(layout))]


def _merged(dims: Sequence[_Dim]) -> list[_Dim]:
    """Axes from the outermost in the parameter to the innermost; those that follow each other on both sides as one."""
    merged: list[_Dim] = []
    for dim in sorted(dims, key=lambda d: -d.dst):
        if merged and merged[-1].dst == dim.size * dim.dst and merged[-1].src == dim.size * dim.src:
            dim = _Dim(merged.pop().size * dim.size, dim.dst, dim.src)
        merged.append(dim)
    return merged
