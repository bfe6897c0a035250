"""A view of a tensor, as boxes of it.

A loader narrows, chunks, transposes and views a parameter before it writes. All that is left of it when the write comes
are the view's offset, sizes and strides; `trace_view` turns them back into boxes of the parameter, and says which part
of the written values each box takes.

Offsets, sizes and strides are in elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .boxes import Box
from .pieces import Piece


class _Dim(NamedTuple):
    """An axis of a view: ``size`` elements, ``dst`` apart in the parameter, ``src`` apart in the written values."""

    size: int
    dst: int
    src: int


class NoBoxError(ValueError):
    """A view that boxes of the parameter can't express (overlapping elements, a parameter with holes)."""


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
    """The boxes of a parameter that a view of it covers, in order of the view, and where their values come from.

    Args:
        shape, strides: of the parameter, which must be dense (any order of axes).
        offset, sizes, dst_strides: of the view, the offset relative to the parameter's own.
        src_strides, src_off: of what is written to the view, axis by axis.

    Raises:
        NoBoxError: the parameter has holes, or elements of the view coincide.
    """
    if not math.prod(sizes):
        return []
    order = sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])
    extents, steps = [shape[d] for d in order], [strides[d] for d in order]
    inner = 1
    for extent, step in zip(reversed(extents), reversed(steps), strict=True):
        if step != inner:
            raise NoBoxError(f"shape {list(shape)} with strides {list(strides)} is not dense")
        inner *= extent
    dims = [_Dim(*dim) for dim in zip(sizes, dst_strides, src_strides, strict=True) if dim[0] > 1]
    if any(dim.dst <= 0 for dim in dims):
        raise NoBoxError("the view repeats elements")
    pieces = []
    for off, size, src, shift in _decode(extents, steps, offset, _merged(dims), src_off):
        whole_off, whole_size, whole_src = [0] * len(shape), [1] * len(shape), [0] * len(shape)
        for d, a, n, s in zip(order, off, size, src, strict=True):
            whole_off[d], whole_size[d], whole_src[d] = a, n, s
        pieces.append(Piece(tuple(whole_off), tuple(whole_size), src_name, shift, tuple(whole_src)))
    return pieces


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


_Found = tuple[list[int], list[int], list[int], int]


def _decode(extents: list[int], steps: list[int], offset: int, dims: list[_Dim], shift: int) -> Iterator[_Found]:
    """(offsets, sizes, source strides) along the parameter's axes, outermost first, and the source offset."""
    start, rest = [], offset
    for step in steps:
        start.append(rest // step)
        rest %= step
    size, src, taken = [1] * len(steps), [0] * len(steps), [False] * len(steps)
    queue = list(dims)
    while queue:
        dim = queue.pop(0)
        axis = next(i for i, step in enumerate(steps) if step <= dim.dst)
        others = [*(_Dim(size[i], steps[i], src[i]) for i in range(len(steps)) if taken[i]), *queue]
        if dim.dst != steps[axis] or taken[axis]:  # every other row, say: each is a box of its own
            for k in range(dim.size):
                yield from _decode(extents, steps, offset + k * dim.dst, others, shift + k * dim.src)
            return
        room = extents[axis] - start[axis]
        if dim.size <= room:
            size[axis], src[axis], taken[axis] = dim.size, dim.src, True
            continue
        if axis == 0:
            raise NoBoxError("the view reaches beyond the parameter")
        # a run that goes on in the next row: what is left of this row, then whole rows, then the rest
        extent = extents[axis]
        if start[axis] == 0 and dim.size % extent == 0:
            rows = _Dim(dim.size // extent, steps[axis - 1], dim.src * extent)
            queue = sorted([rows, _Dim(extent, dim.dst, dim.src), *queue], key=lambda d: -d.dst)
            continue
        first = room if start[axis] else dim.size // extent * extent
        for begin, count in ((0, first), (first, dim.size - first)):
            part = [*others, _Dim(count, dim.dst, dim.src)]
            ordered = sorted((d for d in part if d.size > 1), key=lambda d: -d.dst)
            yield from _decode(extents, steps, offset + begin * dim.dst, ordered, shift + begin * dim.src)
        return
    yield start, size, src, shift
