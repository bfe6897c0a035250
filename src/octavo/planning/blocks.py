"""Gathering chunks into blocks, the units of copying to an accelerator: runs of a file, of whatever parameters.

There, what costs is not the arithmetic but launching it (15 to 40 µs an operation, all told), thousands of times a
model. And since all parameters have their memory already, nothing depends on their order. So chunks are put in the
order of the file; those that follow each other make a block, whatever lies between them that is not read; and those of
a block that lie regularly, in it and in their parameter, are joined to a *bundle*: gate and up of an expert, the same
of the next ones.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..checkpoint import dtypes
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, packed_strides, whole
from .bundles import Bundle, Coded, join, most_weights
from .chunks import Chunk, Work, cut_placement
from .coded import Cells, lays
from .placement import Placement

#: scales begin at a multiple of so many bytes of a block
_ALIGNED = 8
#: what a chunk is read from, which piece of that, and what of scales
Stored = tuple[TensorInfo, Piece, Coded | None]
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
    for at, chunk, (info, piece, coded) in _in_file_order(placements, tensors, block_bytes):
        itemsize, numel = _itemsize(info), math.prod(piece.size)
        nbytes, is_run, more = numel * itemsize, piece.run_length == numel, _nbytes_beside(coded)
        between = 0
        if bundles and info.shard == shard and at > end:
            between = _scales_between(bundles[-1].coded, shard, end, at, filled)
        # elements must be aligned within the block
        fits = filled + between + nbytes + beside + more <= block_bytes and not (filled + between) % itemsize
        if bundles and not (is_run and fits and info.shard == shard and at >= end):
            yield _block(runs, bundles, block_bytes)
            bundles, runs, filled, beside, between = [], [], 0, 0, 0
        shard = info.shard
        if is_run:
            if between:
                _append(runs, shard, end, between, runs[-1].shared)
                filled += between
            bundles.append(_bundle(chunk, info, filled // itemsize, piece.src_strides, coded))
            _append(runs, shard, at, nbytes, chunk.placement.columns is not None)
            filled, beside, end = filled + nbytes, beside + more, at + nbytes
            continue
        length, offsets = piece.runs()
        scattered = [Run(shard, info.offset + offset * itemsize, length * itemsize) for offset in offsets]
        # read one after another, they lie without holes
        packed = packed_strides(piece.size, piece.src_strides)
        yield _block(scattered, [_bundle(chunk, info, 0, packed, coded)], block_bytes)
    if bundles:
        yield _block(runs, bundles, block_bytes)


def _append(runs: list[Run], shard: int, offset: int, nbytes: int, shared: bool = False) -> None:
    """Add a run, or make the last one longer. What lies between is not for here: other ranks' rows, say."""
    last = runs[-1] if runs else None
    if last and last.shard == shard and last.shared == shared and last.offset + last.nbytes == offset:
        runs[-1] = Run(shard, last.offset, last.nbytes + nbytes, shared)
    else:
        runs.append(Run(shard, offset, nbytes, shared))


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


def _bundle(chunk: Chunk, info: TensorInfo, at: int, strides: tuple[int, ...], coded: Coded | None) -> Bundle:
    """The bundle of a chunk that lies there in its block, in elements; of codes, one may hold several weights."""
    placement, work, piece, _, cells, phase, *_ = chunk
    within = Piece(piece.dst_off, piece.size, piece.src_name, at, strides)
    return Bundle(placement, work, info.dtype_name, within, cells, phase, (chunk,), coded)


def _block(runs: list[Run], bundles: list[Bundle], block_bytes: int) -> Block:
    in_order = any(bundle.work in (Work.AMAX, Work.REREAD) for bundle in bundles)
    if any(bundle.coded for bundle in bundles):
        bundles = _with_scales(runs, bundles)
    bundles = join(bundles, most_weights(block_bytes))
    return Block(tuple(runs), sum(run.nbytes for run in runs), tuple(bundles), in_order)


# -- sources that are quantized already -------------------------------------------------------------------------------


def _itemsize(info: TensorInfo) -> int:
    """Bytes of an element."""
    return dtypes.moved_bits(info.dtype_name) // 8


def _stored(chunk: Chunk, tensors: Mapping[str, TensorInfo]) -> Stored:
    """What a chunk is read from, and which piece of that; what of scales, as pieces of the files."""
    info, coding, piece = tensors[chunk.piece.src_name], tensors[chunk.piece.src_name].coding, chunk.piece
    if coding is None or not piece.numel:
        return info, piece, None
    lay, codes, cells = lays(
        piece.size, piece.src_off, piece.src_strides, coding.shape, coding.decoding, coding.transposed
    )
    assert lay is not None
    assert cells is not None, "Placement.by_host"
    by, words = coding.global_scale, 1 if lay.axis is None else codes.size[lay.axis]
    codes = Piece(piece.dst_off, codes.size, coding.codes.name, codes.src_off, codes.src_strides)
    return coding.codes, codes, Coded(coding, lay, words, cells, None if by is None else whole(by.name, (by.numel,)))


def _scales(coded: Coded) -> Iterator[tuple[TensorInfo, Piece]]:
    yield coded.coding.scale, coded.scale.piece
    if coded.coding.global_scale is not None and coded.global_scale is not None:
        yield coded.coding.global_scale, coded.global_scale


def _scales_between(coded: Coded | None, shard: int, end: int, at: int, filled: int) -> int:
    """The bytes between codes and those that follow them in the file, if these are their scales, aligned in the block.

    They are then read as they lie, in one read with the codes. 0: what lies there is not for here.
    """
    if coded is None:
        return 0
    info, piece = coded.coding.scale, coded.scale.piece
    if info.shard != shard or info.offset < end:
        return 0
    itemsize = _itemsize(info)
    start, nbytes = info.offset + piece.src_off * itemsize, math.prod(piece.size) * itemsize
    whole = start + nbytes <= at <= end + nbytes + 2 * _ALIGNED
    return at - end if whole and piece.run_length == piece.numel and not (filled + start - end) % itemsize else 0


def _nbytes_beside(coded: Coded | None) -> int:
    """Bytes that are beside codes in a block; the first of them are aligned."""
    if coded is None:
        return 0
    nbytes = _ALIGNED
    for info, piece in _scales(coded):
        nbytes += math.prod(piece.size) * _itemsize(info)
    return nbytes


def _with_scales(runs: list[Run], bundles: Iterable[Bundle]) -> list[Bundle]:
    """Bundles whose pieces of scales count within the block, to which these are added behind the codes.

    Those of large elements come first, so that all are aligned; what is read with codes stays there.
    """
    bundles, filled = list(bundles), sum(run.nbytes for run in runs)
    held, starts = _held(runs)
    found = [(-_itemsize(e[0]), number, *e) for number, b in enumerate(bundles) if b.coded for e in _scales(b.coded)]
    if filled % _ALIGNED:
        runs.append(Run(NOTHING, 0, -filled % _ALIGNED))
        filled += runs[-1].nbytes
    found.sort(key=operator.itemgetter(0))
    for size, number, info, piece in found:
        nbytes, within = -size * math.prod(piece.size), None
        if -size * piece.run_length == nbytes:
            within = _within(held, starts, info.shard, info.offset - size * piece.src_off, nbytes)
        if within is None or within % size:
            length, offsets = piece.runs()
            for offset in offsets:
                _append(runs, info.shard, info.offset - size * offset, -size * length)
            within, filled = filled, filled + nbytes
        to = Piece(piece.dst_off, piece.size, "", within // -size, packed_strides(piece.size, piece.src_strides))
        bundle = bundles[number]
        assert bundle.coded is not None
        coding, lay, words, scale, globally = bundle.coded
        if info is coding.scale:
            coded = Coded(coding, lay, words, Cells(to, scale.phase), globally)
        else:
            coded = Coded(coding, lay, words, scale, to)
        bundles[number] = Bundle(*bundle[:-1], coded)
    return bundles


def _within(held: list[tuple[int, int]], starts: list[int], shard: int, offset: int, nbytes: int) -> int | None:
    """Where bytes of a file lie in a block whose runs hold them; None if none does."""
    run = bisect.bisect_right(held, (shard, offset)) - 1
    if run < 0 or held[run][0] != shard:
        return None
    at = starts[run] + offset - held[run][1]
    return at if at + nbytes <= starts[run + 1] else None


def _held(runs: Sequence[Run]) -> tuple[list[tuple[int, int]], list[int]]:
    """Where the runs of a block begin in their files, in order, and in the block; and where that ends."""
    starts = [0, *itertools.accumulate(run.nbytes for run in runs)]
    held = [(run.shard, run.offset) for run in runs]
    assert all(a < b for a, b in itertools.pairwise(held)), "in the order of the files"
    return held, starts


# -- the order of the files -------------------------------------------------------------------------------------------


def _in_file_order(
    placements: Iterable[Placement], tensors: Mapping[str, TensorInfo], limit_bytes: int
) -> Iterator[tuple[int, Chunk, Stored]]:
    """(byte offset in its file, chunk, its source). Chunks of a unit, which share scale groups, stay in their order.

    Placements are in the order of their first bytes, so a chunk may go out once none that is not cut yet can precede
    it: reading begins before all is cut.
    """
    waiting: list[tuple[int, int, int, int, Chunk, Stored]] = []
    count, unit = itertools.count(), 0
    for placement in placements:
        if not placement.pieces:
            continue
        piece = placement.pieces[0]
        first = (tensors[piece.src_name].shard, tensors[piece.src_name].offset)
        while waiting and waiting[0][:2] < first:
            yield heapq.heappop(waiting)[3:]
        units: dict[int, tuple[int, int]] = {}
        for chunk in cut_placement(placement, limit_bytes, unit):
            info, stored, _ = source = _stored(chunk, tensors)
            at = info.offset + stored.src_off * _itemsize(info)
            place = (info.shard, at)
            if chunk.work in (Work.AMAX, Work.REREAD):
                place = units.setdefault(chunk.unit, place)
            heapq.heappush(waiting, (*place, next(count), at, chunk, source))
            unit = chunk.unit
        unit += 1
    while waiting:
        yield heapq.heappop(waiting)[3:]
