"""Gathering chunks into blocks, the units of copying to an accelerator: runs of a file, of whatever parameters.

There, what costs is not the arithmetic but launching it (15 to 40 µs an operation, all told), thousands of times a
model. And since all parameters have their memory already, nothing depends on their order. So chunks are put in the
order of the file; those that follow each other make a block, whatever lies between them that is not read; and those of
a block that lie regularly, in it and in their parameter, are joined to a *bundle*: gate and up of an expert, the same
of the next ones.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..checkpoint import dtypes
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, packed_strides, whole
from .bundles import Bundle, Coded, join
from .chunks import Chunk, Work, cut_placement
from .coded import cells_piece, codes_piece, lay_of
from .placement import Placement

#: scales begin at a multiple of so many bytes of a block
_ALIGNED = 8
#: the shard of bytes that are there so that what follows is aligned
NOTHING = -1


class Run(NamedTuple):
    """Bytes of a file that lie one after another, or so many bytes of a block that hold nothing."""

    shard: int  # `NOTHING`: of none
    offset: int
    nbytes: int
    shared: bool = False  # other ranks read them, too: from the page cache, if this one reads them through it


class Block(NamedTuple):
    """Bytes that are copied to a device at once: those of ``runs``, one after another."""

    runs: tuple[Run, ...]
    nbytes: int
    bundles: tuple[Bundle, ...]
    in_order: bool  # some chunks share scale groups with those of other blocks: these blocks follow one another

    @property
    def device(self) -> str:
        return self.bundles[0].placement.device


class Read(NamedTuple):
    """A part of a block that fits a slot."""

    block: Block
    start: int  # in the block
    runs: tuple[Run, ...]
    nbytes: int
    last: bool


def cut_reads(blocks: Iterable[Block], slot_bytes: int) -> Iterator[Read]:
    """The blocks' bytes in their order, a slot at a time; tensors may be cut anywhere."""
    for block in blocks:
        start = 0
        for runs in _fill_slots(block.runs, slot_bytes):
            nbytes = sum(run.nbytes for run in runs)
            yield Read(block, start, runs, nbytes, start + nbytes == block.nbytes)
            start += nbytes
        if not block.nbytes:
            yield Read(block, 0, (), 0, True)


def _fill_slots(runs: Iterable[Run], slot_bytes: int) -> Iterator[tuple[Run, ...]]:
    """The runs, a slot at a time. One that fills a slot has slots of its own, and so may go past the page cache."""
    filling: list[Run] = []
    room = slot_bytes
    for shard, offset, nbytes, shared in runs:
        alone = nbytes >= slot_bytes
        if alone and filling:
            yield tuple(filling)
            filling, room = [], slot_bytes
        while nbytes:
            part = min(nbytes, room)
            filling.append(Run(shard, offset, part, shared))
            offset, nbytes, room = offset + part, nbytes - part, room - part
            if not room or (alone and not nbytes):
                yield tuple(filling)
                filling, room = [], slot_bytes
    if filling:
        yield tuple(filling)


def cut_blocks(placements: Iterable[Placement], tensors: Mapping[str, TensorInfo], block_bytes: int) -> Iterator[Block]:
    """All of a plan's placements in the order of the files, no block larger than ``block_bytes``."""
    bundles: list[Bundle] = []
    runs: list[Run] = []
    shard, filled, beside, end = -1, 0, 0, 0
    for at, chunk in _in_file_order(placements, tensors, block_bytes):
        info, piece, coded = _stored(chunk, tensors)
        itemsize, numel = dtypes.moved_bits(info.dtype_name) // 8, piece.numel
        nbytes, is_run, more = numel * itemsize, piece.run_length == numel, _nbytes_beside(coded)
        # elements must be aligned within the block
        fits = filled + nbytes + beside + more <= block_bytes and not filled % itemsize
        if bundles and not (is_run and fits and info.shard == shard and at >= end):
            yield _block(runs, bundles, block_bytes)
            bundles, runs, filled, beside = [], [], 0, 0
        shard = info.shard
        if is_run:
            within = Piece(piece.dst_off, piece.size, piece.src_name, filled // itemsize, piece.src_strides)
            bundles.append(_bundle(chunk, info, within, coded))
            _append(runs, Run(shard, at, nbytes, shared=chunk.placement.columns is not None))
            filled, beside, end = filled + nbytes, beside + more, at + nbytes
            continue
        length, offsets = piece.runs()
        scattered = [Run(shard, info.offset + offset * itemsize, length * itemsize) for offset in offsets]
        # read one after another, they lie without holes
        packed = piece._replace(src_off=0, src_strides=packed_strides(piece.size, piece.src_strides))
        yield _block(scattered, [_bundle(chunk, info, packed, coded)], block_bytes)
    if bundles:
        yield _block(runs, bundles, block_bytes)


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, or make the last one longer. What lies between is not for here: other ranks' rows, say."""
    last = runs[-1] if runs else None
    if last and last.shard == run.shard and last.shared == run.shared and last.offset + last.nbytes == run.offset:
        runs[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
    else:
        runs.append(run)


def cut_in_turn(
    placements: Iterable[Placement], tensors: Mapping[str, TensorInfo], block_bytes: int
) -> Iterator[Block]:
    """`cut_blocks` of each device's placements, so that all devices have had about the same share of their bytes.

    A file holds a model's layers in their order, as devices do: in the order of the files, one would follow another.
    """
    parts: dict[str, list[Placement]] = {}
    for placement in placements:
        parts.setdefault(placement.device, []).append(placement)
    shares = (_with_share(part, tensors, block_bytes) for part in parts.values())
    return (block for _, block in heapq.merge(*shares, key=operator.itemgetter(0)))


def _with_share(
    placements: Sequence[Placement], tensors: Mapping[str, TensorInfo], block_bytes: int
) -> Iterator[tuple[float, Block]]:
    """Blocks, and which share of the sources goes before each."""
    total, before = max(1, sum(placement.stored_bytes for placement in placements)), 0
    for block in cut_blocks(placements, tensors, block_bytes):
        yield before / total, block
        before += block.nbytes


def _bundle(chunk: Chunk, info: TensorInfo, piece: Piece, coded: Coded | None) -> Bundle:
    if coded is not None:  # the piece is that of codes, of which one may hold several weights
        piece = chunk.piece._replace(src_off=piece.src_off, src_strides=piece.src_strides)
    return Bundle(chunk.placement, chunk.work, info.dtype_name, piece, chunk.cells, chunk.phase, (chunk,), coded)


def _block(runs: list[Run], bundles: list[Bundle], block_bytes: int) -> Block:
    in_order = any(bundle.work in (Work.AMAX, Work.REREAD) for bundle in bundles)
    if any(bundle.coded for bundle in bundles):
        bundles = _with_scales(runs, bundles)
    bundles = join(bundles, block_bytes // 2)  # where what is made of codes has to be kept, it has half a block
    return Block(tuple(runs), sum(run.nbytes for run in runs), tuple(bundles), in_order)


# -- sources that are quantized already -------------------------------------------------------------------------------


def _stored(chunk: Chunk, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, Piece, Coded | None]:
    """What a chunk is read from, and which piece of that; what of scales, as pieces of the files."""
    info, coding = tensors[chunk.piece.src_name], tensors[chunk.piece.src_name].coding
    if coding is None or not chunk.piece.numel:
        return info, chunk.piece, None
    lay = lay_of(chunk.piece, coding.matrix)
    cells = None if lay is None else cells_piece(chunk.piece, lay, coding)
    assert lay is not None
    assert cells is not None, "Placement.by_host"
    codes, by = codes_piece(chunk.piece, lay, coding), coding.global_scale
    words = 1 if lay.axis is None else codes.size[lay.axis]
    return coding.codes, codes, Coded(coding, lay, words, cells, None if by is None else whole(by.name, (by.numel,)))


def _scales(coded: Coded) -> Iterator[tuple[TensorInfo, Piece]]:
    yield coded.coding.scale, coded.scale.piece
    if coded.coding.global_scale is not None and coded.global_scale is not None:
        yield coded.coding.global_scale, coded.global_scale


def _nbytes_beside(coded: Coded | None) -> int:
    """Bytes that are beside codes in a block; the first of them are aligned."""
    if coded is None:
        return 0
    return _ALIGNED + sum(piece.numel * dtypes.moved_bits(info.dtype_name) // 8 for info, piece in _scales(coded))


def _with_scales(runs: list[Run], bundles: Iterable[Bundle]) -> list[Bundle]:
    """Bundles whose pieces of scales count within the block, to which these are added behind the codes.

    Those of large elements come first, so that all are aligned.
    """
    bundles, filled = list(bundles), sum(run.nbytes for run in runs)
    found = [(number, *each) for number, b in enumerate(bundles) if b.coded for each in _scales(b.coded)]
    if filled % _ALIGNED:
        runs.append(Run(NOTHING, 0, -filled % _ALIGNED))
        filled += runs[-1].nbytes
    for number, info, piece in sorted(found, key=lambda each: -dtypes.moved_bits(each[1].dtype_name)):
        itemsize, (length, offsets) = dtypes.moved_bits(info.dtype_name) // 8, piece.runs()
        for offset in offsets:
            _append(runs, Run(info.shard, info.offset + offset * itemsize, length * itemsize))
        within = piece._replace(src_off=filled // itemsize, src_strides=packed_strides(piece.size, piece.src_strides))
        coded = bundles[number].coded
        assert coded is not None
        if info is coded.coding.scale:
            coded = coded._replace(scale=coded.scale._replace(piece=within))
        else:
            coded = coded._replace(global_scale=within)
        bundles[number] = bundles[number]._replace(coded=coded)
        filled += piece.numel * itemsize
    return bundles


# -- the order of the files -------------------------------------------------------------------------------------------


def _in_file_order(
    placements: Iterable[Placement], tensors: Mapping[str, TensorInfo], limit_bytes: int
) -> Iterator[tuple[int, Chunk]]:
    """(byte offset in its file, chunk). Chunks of a unit, which share scale groups, stay together and in their order.

    Placements are in the order of their first bytes, so a chunk may go out once none that is not cut yet can precede
    it: reading begins before all is cut.
    """
    waiting: list[tuple[int, int, int, int, Chunk]] = []
    count, unit = itertools.count(), 0
    for placement in placements:
        if not placement.pieces:
            continue
        piece = placement.pieces[0]
        first = (tensors[piece.src_name].shard, tensors[piece.src_name].offset)
        while waiting and waiting[0][:2] < first:
            *_, at, chunk = heapq.heappop(waiting)
            yield at, chunk
        units: dict[int, tuple[int, int]] = {}
        for chunk in cut_placement(placement, limit_bytes, unit):
            info, stored, _ = _stored(chunk, tensors)
            at = info.offset + stored.src_off * dtypes.moved_bits(info.dtype_name) // 8
            place = (info.shard, at)
            if chunk.work in (Work.AMAX, Work.REREAD):
                place = units.setdefault(chunk.unit, place)
            heapq.heappush(waiting, (*place, next(count), at, chunk))
            unit = chunk.unit
        unit += 1
    while waiting:
        *_, at, chunk = heapq.heappop(waiting)
        yield at, chunk
