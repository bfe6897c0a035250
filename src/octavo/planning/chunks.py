"""Cutting a plan into chunks, the units of reading, and chunks into tiles, the units of arithmetic.

A chunk is a box of one piece that fits a slot. Wherever possible it holds whole scale groups, so that it can be
quantized the moment it is read. Where that is impossible (a tensor-wide scale of a tensor larger than a slot) or would
mean tiny reads (rows of a transposed source), the piece is read twice: all its chunks for the amax, then all again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from ..elements.pieces import Piece, whole
from ..numerics import schemes
from ..numerics.scale_grid import cells_of, cuts_no_group
from ..numerics.schemes import Scheme, Stored
from .coded import stored_nbytes
from .placement import Placement

#: a run of the file shorter than this is not worth a read of its own: such a piece is read twice instead
_MIN_RUN_BYTES = 4096
_ENDLESS = 1 << 62


class Work(Enum):
    """The work that is done with a chunk once it is read."""

    COPY = "copy"  # place it, casting if need be
    PASS = "pass"  # place codes and scales as they are
    QUANTIZE = "quantize"  # its scale groups are complete: scale, quantize, place
    AMAX = "amax"  # first reading of a piece whose groups span chunks
    REREAD = "reread"  # second reading: the scales are known


class Chunk(NamedTuple):
    """A box of one piece that fits a slot, and what to do with it."""

    placement: Placement
    work: Work
    piece: Piece
    nbytes: int
    cells: tuple[slice, ...]  # its scale groups within the placement's scale grid; () when copied
    phase: tuple[int, int]  # row and column within its scale group at which it begins
    unit: int  # chunks of one unit share scale groups; AMAX comes before REREAD within it
    last: bool  # no chunk of this placement follows


class Tile(NamedTuple):
    """A part of a chunk that fits scratch memory; cells and phase as in `Chunk`, relative to the chunk."""

    box: Piece
    cells: tuple[slice, ...]
    phase: tuple[int, int]

    def region(self, tensor: Tensor) -> Tensor:
        return self.box.region(tensor)

    def numbers(self, stored: Stored) -> Stored:
        """Where its numbers go."""
        return schemes.region(stored, self.box.box)


def default_slot_bytes(placements: Iterable[Placement], staging_bytes: int) -> int:
    """The slot size at which chunks are efficient: a whole 128-row run of the widest matrix, within 1 to 8 MiB.

    Of a matrix that the file has the other way round, all of it: what is cut there is written in tiny pieces.
    """
    widest = max((_efficient_bytes(p) for p in placements if p.scheme or p.codings), default=0)
    return min(max(widest, 1 << 20), 8 << 20, max(staging_bytes // 4, 1 << 16))


def _efficient_bytes(placement: Placement) -> int:
    piece = placement.pieces[0] if placement.pieces else None
    lone = len(placement.shape) == 2 or bool(placement.codings)
    if piece is not None and lone and piece.src_strides[-2] < piece.src_strides[-1]:
        return math.prod(piece.size[-2:]) * placement.itemsize
    return placement.shape[-1] * 4 * 128


def cut_placements(placements: Iterable[Placement], slot_bytes: int) -> Iterator[Chunk]:
    """All chunks in the order of reading, none larger than ``slot_bytes``."""
    unit = 0
    for placement in placements:
        for chunk in cut_placement(placement, slot_bytes, unit):
            yield chunk
            unit = chunk.unit
        unit += 1


def cut_placement(placement: Placement, slot_bytes: int, first_unit: int = 0) -> Iterator[Chunk]:
    """The chunks of one placement; units are numbered from ``first_unit``, and don't decrease."""
    itemsize, codings = placement.itemsize, dict(placement.codings)
    found = list(_cut_placement(placement, slot_bytes))
    if placement.columns is not None:  # what has no place here is read for its amax alone
        found = [each for each in found if each[0] is Work.AMAX or placement.partition(each[1]) is not None]
    grid = placement.grid if placement.scheme else None
    for left, (work, piece, part, unit) in zip(range(len(found) - 1, -1, -1), found, strict=True):
        cells: tuple[slice, ...] = ()
        phase = (0, 0)
        if grid is not None:
            cells, phase = grid.place(piece.box, part)
        nbytes = stored_nbytes(piece, codings.get(piece.src_name), itemsize)
        yield Chunk(placement, work, piece, nbytes, cells, phase, first_unit + unit, last=not left)


@functools.lru_cache(maxsize=4096)
def cut_tiles(shape: tuple[int, ...], scheme: Scheme, phase: tuple[int, int], limit: int) -> tuple[Tile, ...]:
    """Cut a chunk of the given shape into tiles of at most ``limit`` elements, along group boundaries if possible."""
    box = whole("", shape)
    groups = (scheme.group_rows or _ENDLESS, scheme.group_cols or _ENDLESS)
    boxes = list(_cut(box, limit, groups, (-phase[0], -phase[1])))
    if any(b.numel > limit for b in boxes):
        boxes = list(_cut(box, limit, (1, scheme.align), (0, 0)))
    return tuple(Tile(b, *cells_of(b.box, scheme, (-phase[0], -phase[1]))) for b in boxes)


@functools.lru_cache(maxsize=4096)
def cut_boxes(shape: tuple[int, ...], limit: int) -> tuple[Piece, ...]:
    """Cut a chunk of the given shape into boxes of at most ``limit`` elements, whatever groups they cut."""
    return tuple(_cut(whole("", shape), limit, (1, 1), (0, 0)))


@functools.lru_cache(maxsize=4096)
def cut_apart(shape: tuple[int, ...], scheme: Scheme, phase: tuple[int, int], limit: int) -> tuple[Tile, ...] | None:
    """`cut_tiles`; None if some of them have parts of the same scale group."""
    tiles = cut_tiles(shape, scheme, phase, limit)
    corners = [tuple((cells.start, cells.stop) for cells in tile.cells) for tile in tiles]
    covered = sum(math.prod(stop - start for start, stop in corner) for corner in corners)
    cells = math.prod(max(stop for _, stop in axis) for axis in zip(*corners, strict=True))
    return tiles if covered == cells else None


def _cut_placement(placement: Placement, slot_bytes: int) -> Iterator[tuple[Work, Piece, int, int]]:
    """(work, piece, part, unit), the unit counted from 0 within the placement."""
    itemsize = placement.itemsize
    limit = max(1, slot_bytes // placement.read_itemsize)
    if placement.scheme is None:
        yield from ((Work.COPY, c, 0, 0) for piece in placement.pieces for c in _cut(piece, limit, (1, 1), (0, 0)))
        return
    scheme, passed = placement.rule, placement.passed
    cols, start, unit = placement.shape[-1], 0, 0
    for part, rows in enumerate(placement.parts):
        groups = (scheme.group_rows or rows, scheme.group_cols or cols)
        spanning: list[Piece] = []  # pieces that hold only parts of scale groups
        for piece in filter(None, (_within_rows(p, start, start + rows) for p in placement.pieces)):
            if passed:
                yield from ((Work.PASS, chunk, part, unit) for chunk in _cut(piece, limit, (1, 1), (0, 0)))
                continue
            if not cuts_no_group(piece.box, scheme, (start, start + rows), cols):
                spanning.append(piece)
                continue
            if piece.numel <= limit:  # however it lies in the file, once is enough
                yield Work.QUANTIZE, piece, part, unit
                continue
            chunks = list(_cut(piece, limit, groups, (start, 0)))
            if all(c.numel <= limit for c in chunks) and _runs_are_long(chunks, itemsize):
                yield from ((Work.QUANTIZE, chunk, part, unit) for chunk in chunks)
                continue
            for matrix in _matrices(piece):
                unit += 1
                yield from _two_readings([matrix], limit, scheme, part, unit)
        if spanning:
            unit += 1
            yield from _two_readings(spanning, limit, scheme, part, unit)
        unit += 1
        start += rows


def _two_readings(
    pieces: Sequence[Piece], limit: int, scheme: Scheme, part: int, unit: int
) -> Iterator[tuple[Work, Piece, int, int]]:
    chunks = [chunk for piece in pieces for chunk in _cut(piece, limit, (1, scheme.align), (0, 0))]
    yield from ((Work.AMAX, chunk, part, unit) for chunk in chunks)
    yield from ((Work.REREAD, chunk, part, unit) for chunk in chunks)


def _within_rows(piece: Piece, start: int, stop: int) -> Piece | None:
    first, length = piece.dst_off[-2], piece.size[-2]
    if start <= first and first + length <= stop:
        return piece
    low, high = max(first, start), min(first + length, stop)
    return piece.narrow(len(piece.size) - 2, low - first, high - low) if low < high else None


def _matrices(piece: Piece) -> Iterator[Piece]:
    """A piece over a stack as one piece a matrix."""
    for axis in range(len(piece.size) - 2):
        if piece.size[axis] > 1:
            for index in range(piece.size[axis]):
                yield from _matrices(piece.narrow(axis, index, 1))
            return
    yield piece


def _runs_are_long(chunks: Sequence[Piece], itemsize: int) -> bool:
    lengths = ((chunk.run_length, chunk.numel) for chunk in chunks)
    return all(length == numel or length * itemsize >= _MIN_RUN_BYTES for length, numel in lengths)


def _cut(piece: Piece, limit: int, groups: tuple[int, int], origin: tuple[int, int]) -> Iterator[Piece]:
    """Cut a piece into boxes of at most ``limit`` elements, along its outermost axis in the file first.

    No group of (rows, columns), counted from ``origin``, is cut: a box may then exceed the limit, which the caller
    checks.
    """
    if piece.numel <= limit:
        yield piece
        return
    matrix_axes = len(piece.size) - 2
    for axis in piece.file_order():
        size, group, phase = piece.size[axis], 1, 0
        if axis >= matrix_axes >= 0:
            group = groups[axis - matrix_axes]
            phase = (piece.dst_off[axis] - origin[axis - matrix_axes]) % group
        if size == 1 or phase + size <= group:
            continue  # a single group
        fits = limit * size // piece.numel
        step = max(group, fits // group * group)
        start = 0
        while start < size:
            stop = min(size, start + step - (phase + start) % group)
            yield from _cut(piece.narrow(axis, start, stop - start), limit, groups, origin)
            start = stop
        return
    yield piece
