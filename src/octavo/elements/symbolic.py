"""Tensors without data that carry pieces, so that somebody else's code can be run on them.

`Symbolic` carries its pieces through ``cat``, ``stack``, ``split``, ``view``, ``transpose`` and the like. A loader or a
converter that is given such tensors tells where everything goes, and none of its knowledge is repeated here. An
operation that computes instead of moving raises `NotMovementError`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .pieces import Piece, contiguous_strides, put_at, whole
from .views import layout_of


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


def _view(t: Symbolic, shape: Sequence[int]) -> Symbolic:
    """Reshape, row-major: what a piece fills is a view of the memory of the new shape."""
    new = list(shape)
    if -1 in new:
        new[new.index(-1)] = t.numel() // -math.prod(new)
    layout, strides = layout_of(tuple(new), contiguous_strides(new)), contiguous_strides(t.shape)
    pieces = []
    for p in t.pieces:
        offset = sum(map(operator.mul, p.dst_off, strides))
        pieces += layout.pieces(offset, p.size, strides, p.src_strides, p.src_off, p.src_name)
    return _like(t, new, pieces)


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
