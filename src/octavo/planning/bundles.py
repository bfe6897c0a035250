"""Chunks of a block on which one operation does, because they lie regularly, in it and in their parameter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..checkpoint.codings import Coding
from ..elements.pieces import Piece
from ..numerics import schemes
from .chunks import Chunk, Work
from .coded import Cells, Lay
from .placement import Placement


class Coded(NamedTuple):
    """Codes of a chunk, and what belongs to them; pieces count offsets and strides within the block."""

    coding: Coding
    lay: Lay
    codes: Piece
    scale: Cells
    global_scale: Piece | None


class Bundle(NamedTuple):
    """Chunks of one parameter on which one operation does; ``piece`` counts offsets and strides within the block."""

    placement: Placement
    work: Work
    dtype_name: str  # of the source
    piece: Piece
    cells: tuple[slice, ...]
    phase: tuple[int, int]
    chunks: tuple[Chunk, ...]
    coded: Coded | None = None  # of a source that is quantized already; ``piece`` then counts within that


def join(bundles: Iterable[Bundle]) -> list[Bundle]:
    """Join bundles that are one box of their parameter and lie evenly in the block; rows first, then experts."""
    groups: dict[tuple[str, Work, str], list[Bundle]] = {}
    for bundle in bundles:
        groups.setdefault((bundle.placement.name, bundle.work, bundle.dtype_name), []).append(bundle)
    joined: list[Bundle] = []
    for group in groups.values():
        for axis in reversed(range(len(group[0].piece.size))):
            if len(group) == 1:
                break
            if len({bundle.piece.dst_off[axis] for bundle in group}) > 1:  # else they are no neighbours along it
                group = _join_along(axis, group)
        joined += group
    return joined


def _join_along(axis: int, bundles: list[Bundle]) -> list[Bundle]:
    joined, at = [], 0
    while at < len(bundles):
        end = _end_of_run(axis, bundles, at)
        joined.append(bundles[at] if end == at + 1 else _joined(axis, bundles[at:end]))
        at = end
    return joined


def _end_of_run(axis: int, bundles: Sequence[Bundle], at: int) -> int:
    """Up to which bundle those from ``at`` on are neighbours along an axis, and one view shows all of them."""
    first = last = bundles[at]
    p = first.piece
    if at + 1 == len(bundles) or first.work in (Work.AMAX, Work.REREAD):
        return at + 1
    length = p.size[axis]
    stride = p.src_strides[axis] if length > 1 else bundles[at + 1].piece.src_off - p.src_off
    if stride <= 0:
        return at + 1
    for index in range(at + 1, len(bundles)):
        bundle = bundles[index]
        q = bundle.piece
        if q.dst_off[axis] != p.dst_off[axis] + length or q.src_off != p.src_off + stride * length:
            return index
        if (q.size[axis] != 1 and q.src_strides[axis] != stride) or not _alike(p, q, axis):
            return index
        if first.placement.scheme is not None and not _groups_continue(first, last, bundle, axis, length):
            return index
        last = bundle
        length += q.size[axis]
    return len(bundles)


def _alike(p: Piece, q: Piece, axis: int) -> bool:
    """Return True if two pieces are the same along all other axes."""
    for other, (n, m) in enumerate(zip(p.size, q.size, strict=True)):
        if other != axis and (
            n != m or p.dst_off[other] != q.dst_off[other] or (n != 1 and p.src_strides[other] != q.src_strides[other])
        ):
            return False
    return True


def _groups_continue(first: Bundle, last: Bundle, bundle: Bundle, axis: int, length: int) -> bool:
    """Return True if a run (so long) and a bundle, seen as one, have the scale groups of both, none shared or cut."""
    matrix_axis = axis - (len(bundle.piece.size) - 2)
    if matrix_axis < 0:
        return first.phase == bundle.phase
    scheme = schemes.get(bundle.placement.scheme or "")
    group = (scheme.group_rows, scheme.group_cols)[matrix_axis]
    if group is None or last.cells[axis].stop != bundle.cells[axis].start:
        return False
    aligned = not (first.phase[matrix_axis] + length) % group and not bundle.phase[matrix_axis]
    return aligned and first.phase[1 - matrix_axis] == bundle.phase[1 - matrix_axis]


def _joined(axis: int, bundles: Sequence[Bundle]) -> Bundle:
    """The bundle of a run."""
    first, last = bundles[0], bundles[-1]
    p, q = first.piece, last.piece
    stride = p.src_strides[axis] if p.size[axis] > 1 else bundles[1].piece.src_off - p.src_off
    size = (*p.size[:axis], q.dst_off[axis] + q.size[axis] - p.dst_off[axis], *p.size[axis + 1 :])
    strides = (*p.src_strides[:axis], stride, *p.src_strides[axis + 1 :])
    cells = first.cells
    if cells:
        cells = (*cells[:axis], slice(cells[axis].start, last.cells[axis].stop), *cells[axis + 1 :])
    piece = Piece(p.dst_off, size, p.src_name, p.src_off, strides)
    chunks = tuple(itertools.chain.from_iterable(bundle.chunks for bundle in bundles))
    return Bundle(first.placement, first.work, first.dtype_name, piece, cells, first.phase, chunks)
