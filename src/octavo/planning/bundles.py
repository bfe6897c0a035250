"""Chunks of a block on which one operation does, because they lie regularly, in it and in their parameter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..checkpoint.codings import Coding
from ..elements.pieces import Piece, put_at
from .chunks import Chunk, Work
from .coded import Cells, Lay
from .placement import Placement


class Coded(NamedTuple):
    """What a bundle of codes is made of; pieces count offsets and strides within the block."""

    coding: Coding
    lay: Lay
    words: int  # elements of the codes along the columns
    scale: Cells
    global_scale: Piece | None

    @property
    def alike(self) -> tuple[object, ...]:
        """What has to be the same in bundles that are joined."""
        lay, coding = self.lay, self.coding
        return coding.decoding, coding.scale.dtype_name, lay.axis, lay.col, lay.cols

    def axis_of_scale(self, axis: int) -> int | None:
        """The axis of its scales that is this one of the bundle; None for that of the columns."""
        columns = self.lay.axis
        return None if columns is None or axis == columns else axis - (columns < axis)

    def codes(self, piece: Piece) -> Piece:
        """The piece of a bundle as one of the elements of its codes."""
        axis = self.lay.axis
        return piece if axis is None else piece._replace(size=put_at(piece.size, axis, self.words))


class Bundle(NamedTuple):
    """Chunks of one parameter on which one operation does; ``piece`` counts offsets and strides within the block.

    Of codes, it counts them in their elements, and sizes in weights.
    """

    placement: Placement
    work: Work
    dtype_name: str  # of the source
    piece: Piece
    cells: tuple[slice, ...]
    phase: tuple[int, int]
    chunks: tuple[Chunk, ...]
    coded: Coded | None = None  # of a source that is quantized already


def most_weights(block_bytes: int) -> int:
    """The most weights of a bundle of codes: where what is made of them has to be kept, it has so many bytes."""
    return block_bytes * 5 // 6


def join(bundles: Iterable[Bundle], most: int = 0) -> list[Bundle]:
    """Join bundles that are one box of their parameter and lie evenly in the block; rows first, then experts.

    Args:
        most: weights of a bundle of codes.
    """
    groups: dict[tuple[str, Work, str], list[Bundle]] = {}
    for bundle in bundles:
        groups.setdefault((bundle.placement.name, bundle.work, bundle.dtype_name), []).append(bundle)
    joined: list[Bundle] = []
    for group in groups.values():
        for axis in reversed(range(len(group[0].piece.size))):
            if len(group) == 1:
                break
            if len({bundle.piece.dst_off[axis] for bundle in group}) > 1:  # else they are no neighbours along it
                if group[0].coded is not None and group[0].work not in (Work.AMAX, Work.REREAD):
                    group = sorted(group, key=functools.partial(_place_along, axis))
                group = _join_along(axis, group, most)
        joined += group
    return joined


def _place_along(axis: int, bundle: Bundle) -> tuple[int, ...]:
    """What puts bundles in order that may be neighbours along an axis: of gate and up, all that are gate come first."""
    off = bundle.piece.dst_off
    return (*off[:axis], *off[axis + 1 :], off[axis])


def _join_along(axis: int, bundles: list[Bundle], most: int) -> list[Bundle]:
    joined, at = [], 0
    while at < len(bundles):
        end = _end_of_run(axis, bundles, at, most)
        joined.append(bundles[at] if end == at + 1 else _joined(axis, bundles[at:end]))
        at = end
    return joined


def _end_of_run(axis: int, bundles: Sequence[Bundle], at: int, most: int) -> int:
    """Up to which bundle those from ``at`` on are neighbours along an axis, and one view shows all of them."""
    first = last = bundles[at]
    p = first.piece
    if at + 1 == len(bundles) or first.work in (Work.AMAX, Work.REREAD):
        return at + 1
    length = p.size[axis]
    stride = _stride(p, bundles[at + 1].piece, axis)
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
        if first.coded is not None:
            fits = p.numel // p.size[axis] * (length + q.size[axis]) <= most
            if not fits or not _scales_continue(axis, first.coded, bundles[at + 1].coded, bundle.coded, length):
                return index
        last = bundle
        length += q.size[axis]
    return len(bundles)


def _alike(p: Piece, q: Piece, axis: int) -> bool:
    """Return True if two pieces are the same along all other axes."""
    if p.size == q.size and p.src_strides == q.src_strides:  # as mostly, of experts: asked for each
        return p.dst_off[:axis] == q.dst_off[:axis] and p.dst_off[axis + 1 :] == q.dst_off[axis + 1 :]
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
    group = bundle.placement.rule.groups[matrix_axis]
    if group is None or last.cells[axis].stop != bundle.cells[axis].start:
        return False
    aligned = not (first.phase[matrix_axis] + length) % group and not bundle.phase[matrix_axis]
    return aligned and first.phase[1 - matrix_axis] == bundle.phase[1 - matrix_axis]


def _scales_continue(axis: int, first: Coded, second: Coded | None, coded: Coded | None, length: int) -> bool:
    """Return True if one view shows the scales of a run of codes (so long) and of those that follow it."""
    if coded is None or second is None or first.global_scale or coded.global_scale:
        return False
    # what is laid out alike has the same `Lay`
    same = coded.lay is first.lay and coded.coding.decoding is first.coding.decoding
    if not (same and coded.coding.scale.dtype_name == first.coding.scale.dtype_name) and coded.alike != first.alike:
        return False
    at, p, q = first.axis_of_scale(axis), first.scale.piece, coded.scale.piece
    if at is None:
        return False
    if at == len(p.size) - 2:
        group = first.coding.decoding.group_rows
        if group is None or (first.scale.phase + length) % group or coded.scale.phase:
            return False
        length = (first.scale.phase + length) // group
    elif first.scale.phase != coded.scale.phase:
        return False
    stride = _stride(p, second.scale.piece, at)
    regular = q.src_off == p.src_off + stride * length and (q.size[at] == 1 or q.src_strides[at] == stride)
    return stride > 0 and regular and _alike(p, q, at)


def _stride(p: Piece, following: Piece, axis: int) -> int:
    """The stride of a piece along an axis along which another follows it."""
    return p.src_strides[axis] if p.size[axis] > 1 else following.src_off - p.src_off


def _joined(axis: int, bundles: Sequence[Bundle]) -> Bundle:
    """The bundle of a run."""
    first, last = bundles[0], bundles[-1]
    p, q = first.piece, last.piece
    stride = _stride(p, bundles[1].piece, axis)
    size = (*p.size[:axis], q.dst_off[axis] + q.size[axis] - p.dst_off[axis], *p.size[axis + 1 :])
    strides = (*p.src_strides[:axis], stride, *p.src_strides[axis + 1 :])
    cells = first.cells
    if cells:
        cells = (*cells[:axis], slice(cells[axis].start, last.cells[axis].stop), *cells[axis + 1 :])
    piece = Piece(p.dst_off, size, p.src_name, p.src_off, strides)
    chunks = tuple(itertools.chain.from_iterable(bundle.chunks for bundle in bundles))
    coded = None if first.coded is None else _coded(axis, [bundle.coded for bundle in bundles if bundle.coded])
    return Bundle(first.placement, first.work, first.dtype_name, piece, cells, first.phase, chunks, coded)


def _coded(axis: int, run: Sequence[Coded]) -> Coded:
    first, at = run[0], run[0].axis_of_scale(axis)
    assert at is not None
    p, cells = first.scale.piece, sum(coded.scale.piece.size[at] for coded in run)
    strides = put_at(p.src_strides, at, _stride(p, run[1].scale.piece, at))
    scale = first.scale._replace(piece=p._replace(size=put_at(p.size, at, cells), src_strides=strides))
    return first._replace(scale=scale)
