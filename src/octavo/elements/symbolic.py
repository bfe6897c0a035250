"""Tensors without data that carry pieces, so that somebody else's code can be run on them.

`Symbolic` carries its pieces through ``cat``, ``stack``, ``split``, ``view``, ``transpose`` and the like. A loader or a
converter that is given such tensors tells where everything goes, and none of its knowledge is repeated here. An
operation that computes instead of moving raises `NotMovementError`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .pieces import Piece, put_at, whole


class NotMovementError(NotImplementedError):
    """An operation that computes, or moves in a way that boxes can't express."""


class Symbolic(torch.Tensor):
    """A meta tensor that knows, box by box, which checkpoint elements it would hold."""

    pieces: list[Piece]

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[Piece]) -> Symbolic:
        self: Symbolic = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=torch.device("meta")
        )
        self.pieces = list(pieces)
        return self

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Symbolic({list(self.shape)}, {len(self.pieces)} pieces)"

    @classmethod
    def source(cls, name: str, shape: Sequence[int], dtype: torch.dtype) -> Symbolic:
        """All of the checkpoint tensor ``name``."""
        return cls(shape, dtype, [whole(name, shape)])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handler = HANDLERS.get(func.overloadpacket)
        if handler is None:
            raise NotMovementError(f"{func} does not only move elements")
        return handler(*args, **(kwargs or {}))


def _like(t: Symbolic, shape: Sequence[int], pieces: Sequence[Piece]) -> Symbolic:
    return Symbolic(shape, t.dtype, pieces)


def _permute(t: Symbolic, dims: Sequence[int]) -> Symbolic:
    dims = [d % t.ndim for d in dims]
    return _like(t, [t.shape[d] for d in dims], [piece.permute(dims) for piece in t.pieces])


def _transpose(t: Symbolic, a: int, b: int) -> Symbolic:
    dims = list(range(t.ndim))
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(t, dims)


def _slice(t: Symbolic, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Symbolic:
    dim %= t.ndim
    begin, stop, _ = slice(start, end).indices(t.shape[dim])
    if step != 1:
        raise NotMovementError("a slice with a step")
    pieces = []
    for piece in t.pieces:
        low, high = max(piece.dst_off[dim], begin), min(piece.dst_end[dim], stop)
        if low < high:
            cut = piece.narrow(dim, low - piece.dst_off[dim], high - low)
            pieces.append(cut._replace(dst_off=put_at(cut.dst_off, dim, low - begin)))
    return _like(t, put_at(tuple(t.shape), dim, max(0, stop - begin)), pieces)


def _cat(tensors: Sequence[Symbolic], dim: int = 0) -> Symbolic:
    dim %= tensors[0].ndim
    pieces, base = [], 0
    for t in tensors:
        if any(a != b for d, (a, b) in enumerate(zip(t.shape, tensors[0].shape, strict=True)) if d != dim):
            raise ValueError(f"{list(t.shape)} and {list(tensors[0].shape)} don't fit beside each other")
        pieces += [p._replace(dst_off=put_at(p.dst_off, dim, p.dst_off[dim] + base)) for p in t.pieces]
        base += t.shape[dim]
    return _like(tensors[0], put_at(tuple(tensors[0].shape), dim, base), pieces)


def _unsqueeze(t: Symbolic, dim: int) -> Symbolic:
    dim %= t.ndim + 1

    def insert(values: Sequence[int], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim:])

    pieces = [
        p._replace(dst_off=insert(p.dst_off, 0), size=insert(p.size, 1), src_strides=insert(p.src_strides, 0))
        for p in t.pieces
    ]
    return _like(t, insert(tuple(t.shape), 1), pieces)


def _squeeze(t: Symbolic, dim: int | Sequence[int] | None = None) -> Symbolic:
    dims = range(t.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % t.ndim for d in dims if t.shape[d] == 1}
    keep = [d for d in range(t.ndim) if d not in gone]
    return _like(t, [t.shape[d] for d in keep], [piece.permute(keep) for piece in t.pieces])


def _stack(tensors: Sequence[Symbolic], dim: int = 0) -> Symbolic:
    shape = tuple(tensors[0].shape)
    dim %= len(shape) + 1
    pieces = []
    for index, t in enumerate(tensors):
        if tuple(t.shape) != shape:
            raise ValueError(f"{list(t.shape)} and {list(shape)} can't be stacked")
        for p in t.pieces:
            off, size, strides = p.dst_off, p.size, p.src_strides
            pieces.append(
                Piece(
                    (*off[:dim], index, *off[dim:]),
                    (*size[:dim], 1, *size[dim:]),
                    p.src_name,
                    p.src_off,
                    (*strides[:dim], 0, *strides[dim:]),
                )
            )
    return _like(tensors[0], (*shape[:dim], len(tensors), *shape[dim:]), pieces)


def _split(t: Symbolic, size: int | Sequence[int], dim: int = 0) -> list[Symbolic]:
    extent = t.shape[dim]
    sizes = [min(size, extent - i) for i in range(0, extent, size)] if isinstance(size, int) else size
    ends = list(itertools.accumulate(sizes))
    return [_slice(t, dim, end - n, end) for n, end in zip(sizes, ends, strict=True)]


def _chunk(t: Symbolic, chunks: int, dim: int = 0) -> list[Symbolic]:
    return _split(t, max(1, -(-t.shape[dim] // chunks)), dim)


def _select(t: Symbolic, dim: int, index: int) -> Symbolic:
    index %= t.shape[dim]
    return _squeeze(_slice(t, dim, index, index + 1), dim)


def _unbind(t: Symbolic, dim: int = 0) -> list[Symbolic]:
    return [_select(t, dim, i) for i in range(t.shape[dim])]


def _same(t: Symbolic, *_: Any, **__: Any) -> Symbolic:
    return _like(t, t.shape, t.pieces)


class _Axis(NamedTuple):
    """One axis of a box: [off, off + size) of ``extent``, ``stride`` apart in the source."""

    off: int
    size: int
    stride: int
    extent: int


class _Axes(NamedTuple):
    """A box along some axes, and the source's strides; ``shift`` is what it adds to the source offset."""

    off: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...]
    shift: int


def _view(t: Symbolic, shape: Sequence[int]) -> Symbolic:
    """Reshape, row-major. Axes fall into groups with equal products; each group is flattened and cut anew."""
    new = list(shape)
    if -1 in new:
        new[new.index(-1)] = t.numel() // -math.prod(new)
    groups = _matching_groups(list(t.shape), new)
    pieces = []
    for piece in t.pieces:
        per_group = []
        for old_axes, new_axes in groups:
            axes = [_Axis(piece.dst_off[d], piece.size[d], piece.src_strides[d], t.shape[d]) for d in old_axes]
            per_group.append(_regroup(axes, [new[d] for d in new_axes]))
        for boxes in itertools.product(*per_group):
            pieces.append(
                Piece(
                    tuple(itertools.chain(*(box.off for box in boxes))),
                    tuple(itertools.chain(*(box.size for box in boxes))),
                    piece.src_name,
                    piece.src_off + sum(box.shift for box in boxes),
                    tuple(itertools.chain(*(box.strides for box in boxes))),
                )
            )
    return _like(t, new, pieces)


def _matching_groups(old: list[int], new: list[int]) -> list[tuple[range, range]]:
    """Cut both shapes into the shortest runs of axes whose products agree."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a = b = 1
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b:
            if (a < b and i < len(old)) or j == len(new):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def _regroup(axes: Sequence[_Axis], extents: Sequence[int]) -> list[_Axes]:
    """A box over ``axes``, seen as one row-major axis, cut into boxes over axes of the given extents."""
    boxes = []
    for run, shift in _flatten(axes):
        boxes += [box._replace(shift=box.shift + shift) for box in _unflatten(run, extents)]
    return boxes


def _flatten(axes: Sequence[_Axis]) -> list[tuple[_Axis, int]]:
    """A box as runs along the flat axis: (run, source shift)."""
    runs = [(_Axis(0, 1, 0, 1), 0)]
    for axis in axes:
        extended = []
        for run, shift in runs:
            extent = run.extent * axis.extent
            full = axis.off == 0 and axis.size == axis.extent
            if axis.extent == 1:
                extended.append((run, shift))
            elif run.size == 1:
                extended.append((_Axis(run.off * axis.extent + axis.off, axis.size, axis.stride, extent), shift))
            elif full and run.stride == axis.stride * axis.extent:
                extended.append((_Axis(run.off * axis.extent, run.size * axis.extent, axis.stride, extent), shift))
            else:
                for k in range(run.size):
                    off = (run.off + k) * axis.extent + axis.off
                    extended.append((_Axis(off, axis.size, axis.stride, extent), shift + k * run.stride))
        runs = extended
    return runs


def _unflatten(run: _Axis, extents: Sequence[int]) -> list[_Axes]:
    """A run along a flat axis as boxes over axes of the given extents."""
    if not extents:
        return [_Axes((), (), (), 0)]
    if len(extents) == 1:
        return [_Axes((run.off,), (run.size,), (run.stride,), 0)]
    inner = math.prod(extents[1:])
    boxes = []
    at, end = run.off, run.off + run.size
    while at < end:
        index, rest = divmod(at, inner)
        shift = (at - run.off) * run.stride
        if rest == 0 and end - at >= inner:  # whole rows of the outer axis
            count, length = (end - at) // inner, inner
        else:
            count, length = 1, min(inner - rest, end - at)
        for box in _unflatten(_Axis(rest, length, run.stride, inner), extents[1:]):
            boxes.append(
                _Axes(
                    (index, *box.off),
                    (count, *box.size),
                    (run.stride * inner, *box.strides),
                    box.shift + shift,
                )
            )
        at += count * length
    return boxes


_aten = torch.ops.aten


HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.cat: _cat,
    _aten.stack: _stack,
    _aten.transpose: _transpose,
    _aten.permute: _permute,
    _aten.t: lambda t: _transpose(t, 0, 1),
    _aten.slice: _slice,
    _aten.select: _select,
    _aten.split: _split,
    _aten.split_with_sizes: _split,
    _aten.chunk: _chunk,
    _aten.unbind: _unbind,
    _aten.view: _view,
    _aten._unsafe_view: _view,
    _aten.reshape: _view,
    _aten.unsqueeze: _unsqueeze,
    _aten.squeeze: _squeeze,
    _aten.clone: _same,
    _aten.contiguous: _same,
    _aten.detach: _same,
    _aten.alias: _same,
    _aten._to_copy: lambda t, dtype=None, **_: Symbolic(t.shape, dtype or t.dtype, t.pieces),
}
