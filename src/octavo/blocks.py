"""Gathering chunks into blocks, the units of reading for an accelerator: runs of a file, of whatever parameters.

There, what a chunk costs is launching its copy and its kernels, so fewer and larger reads are faster; and since all
parameters have their memory already, nothing depends on their order. So chunks are put in the order of the file, and
those that follow each other without a gap are read, and copied, at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from . import dtypes
from .checkpoint import TensorInfo
from .chunks import Chunk, Work, cut_placement
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk within a block."""

    chunk: Chunk
    dtype_name: str  # of the source
    start: int  # bytes from the beginning of the block


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a file that fits a slot, and the chunks in it; or a lone chunk that is many runs (``offset`` None)."""

    shard: int
    offset: int | None  # in bytes from the start of the file
    nbytes: int
    parts: tuple[Part, ...]
    in_order: bool  # some chunks share scale groups with those of other blocks: these blocks follow one another


def cut_blocks(plan: Plan, tensors: Mapping[str, TensorInfo], slot_bytes: int) -> Iterator[Block]:
    """All of a plan in the order of the files, no block larger than ``slot_bytes``."""
    parts: list[Part] = []
    shard, start, end = -1, 0, 0
    for at, chunk in _in_file_order(plan, tensors, slot_bytes):
        info = tensors[chunk.piece.src_name]
        is_run, itemsize = chunk.piece.is_run, dtypes.moved_bits(info.dtype_name) // 8
        nbytes = chunk.piece.numel * itemsize
        # elements must be aligned within the block
        fits = at + nbytes - start <= slot_bytes and not (at - start) % itemsize
        if not (parts and is_run and fits and at == end and info.shard == shard):
            if parts:
                yield _block(shard, start, end, parts)
            parts, shard, start, end = [], info.shard, at, at
        if not is_run:
            yield _block(shard, None, nbytes, [Part(chunk, info.dtype_name, 0)])
            continue
        parts.append(Part(chunk, info.dtype_name, at - start))
        end = at + nbytes
    if parts:
        yield _block(shard, start, end, parts)


def _block(shard: int, start: int | None, end: int, parts: list[Part]) -> Block:
    in_order = any(part.chunk.work in (Work.AMAX, Work.REREAD) for part in parts)
    return Block(shard, start, end - (start or 0), tuple(parts), in_order)


def _in_file_order(plan: Plan, tensors: Mapping[str, TensorInfo], slot_bytes: int) -> Iterator[tuple[int, Chunk]]:
    """(byte offset in its file, chunk). Chunks of a unit, which share scale groups, stay together and in their order.

    Placements are in the order of their first bytes, so a chunk may go out once none that is not cut yet can precede
    it: reading begins before all is cut.
    """
    waiting: list[tuple[int, int, int, int, Chunk]] = []
    count, unit = itertools.count(), 0
    for placement in plan.placements:
        if not placement.pieces:
            continue
        piece = placement.pieces[0]
        first = (tensors[piece.src_name].shard, tensors[piece.src_name].offset)
        while waiting and waiting[0][:2] < first:
            *_, at, chunk = heapq.heappop(waiting)
            yield at, chunk
        units: dict[int, tuple[int, int]] = {}
        for chunk in cut_placement(placement, slot_bytes, unit):
            info = tensors[chunk.piece.src_name]
            at = info.offset + chunk.piece.src_off * dtypes.moved_bits(info.dtype_name) // 8
            place = (info.shard, at)
            if chunk.work in (Work.AMAX, Work.REREAD):
                place = units.setdefault(chunk.unit, place)
            heapq.heappush(waiting, (*place, next(count), at, chunk))
            unit = chunk.unit
        unit += 1
    while waiting:
        *_, at, chunk = heapq.heappop(waiting)
        yield at, chunk
