"""Two checkpoints, compared block by block: a source, by the definition of `octavo.schemes`, and what was made of it.

An independent way: blocks are cut here, and not by the plan of a stream. Threads read both with `preadv`, into memory
of their own, so that what is missing on disk is an error and not a signal that ends the process.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.codings import Coding
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, whole
from ..numerics import nvfp4, schemes
from ..numerics.lossless import lossless_scale
from ..numerics.nvfp4 import E4M3, Packed
from ..numerics.schemes import Scheme
from ..planning.budget import TILE_ELEMENTS, check_options, default_threads
from ..planning.coded import keeps_all, passes, stored_piece
from ..streaming.coded import Encoded, read_encoded
from ..streaming.files import Files
from ..streaming.ring import Ring
from . import packing

#: what comparing an element takes: the weight in float32, its FP8 number twice, and what the definition allocates
_ELEMENT_BYTES = 32
#: the smallest block holds a group of any scheme
_LEAST_ELEMENTS = 128 * 128


@functools.cache
def _numbers(dtype: torch.dtype) -> Any:
    """What each byte is as a number: looking it up is several times faster than torch's conversion of FP8."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


@dataclass
class Pair:
    """A tensor of the source, what was made of it, and how these compare so far."""

    here: TensorInfo
    there: TensorInfo
    matrix: Piece | None = None  # of ``there``, which is a stack; None: all of it
    is_packed: bool = False  # ``here`` is what is in a packed tensor
    scheme: Scheme | None = None  # None: kept, byte for byte
    scale: TensorInfo | None = None  # None although quantized: of dtypes that can't be compared
    whole_scale: TensorInfo | None = (
        None  # one by the scale of all, where `scale` are those of groups among the numbers
    )
    differing_bytes: int = 0
    signal: float = 0.0  # |w|²
    noise: float = 0.0  # |w - q·scale|²

    @functools.cached_property
    def passed(self) -> bool:
        """Return True if codes and scales are those of the source, as plans have it."""
        return self._is(passes)

    @property
    def passing(self) -> tuple[Coding, ...]:
        """Codings of what passes through."""
        coding = self.there.coding
        return (coding,) if coding is not None and self.passed else ()

    @functools.cached_property
    def lossless(self) -> bool:
        """Return True if scales are those by which most weights stay what they are, as plans have it."""
        return not self.passed and self._is(keeps_all)

    def _is(self, question: Callable[..., bool]) -> bool:
        if self.scheme is None or self.there.coding is None:
            return False
        piece = self.matrix or whole(self.there.name, self.there.shape)
        *_, rows, cols = self.shape
        return question([piece], [rows], cols, self.scheme, {self.there.name: self.there.coding})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what was made, if it is what it should be."""
        return self.there.shape if self.matrix is None else self.matrix.size

    def source_box(self, matrix: int, rows: tuple[int, int], cols: tuple[int, int]) -> Piece:
        """Where a box of one matrix lies in the source."""
        if self.matrix is None:
            return _piece(matrix, self.shape[-2:], rows, cols)
        part = self.matrix.narrow(0, rows[0], rows[1] - rows[0])
        return part.narrow(1, cols[0], cols[1] - cols[0])


@dataclass
class Unit:
    """Scale groups that span blocks: all are read for the amax, and then to compare."""

    left: int  # blocks whose amax is unknown
    amax: Tensor = field(default_factory=lambda: torch.zeros((1, 1), dtype=torch.float32))


class Block(NamedTuple):
    """A box of a matrix, or a run of a kept tensor's bytes (rows of one byte)."""

    pair: Pair
    matrix: int  # of a stack
    rows: tuple[int, int]
    cols: tuple[int, int]
    unit: Unit | None = None
    measure: bool = False  # only the amax is wanted
    scales: bool = True  # whether it is this block that compares the scales of its groups


def cut(pairs: Iterable[Pair], limit: int) -> Iterator[Block]:
    """Every element of every pair once (twice where groups span blocks), in blocks of ``limit`` elements or fewer."""
    for pair in pairs:
        if pair.scheme is None and pair.there.coding is not None:
            *lead, rows, cols = pair.shape
            width = min(cols, limit)
            for matrix in range(math.prod(lead) if rows and cols else 0):
                yield from (
                    Block(pair, matrix, r, c) for r in _steps(rows, limit // width) for c in _steps(cols, width)
                )
            continue
        if pair.scheme is None:
            for start in range(0, pair.there.nbytes, limit):
                yield Block(pair, 0, (start, min(start + limit, pair.there.nbytes)), (0, 1))
            continue
        *lead, rows, cols = pair.shape
        for matrix in range(math.prod(lead) if pair.scale and rows and cols else 0):
            yield from _cut_matrix(pair, matrix, rows, cols, pair.scheme, limit)


def _cut_matrix(pair: Pair, matrix: int, rows: int, cols: int, scheme: Scheme, limit: int) -> Iterator[Block]:
    high, wide = min(scheme.group_rows or rows, rows), min(scheme.group_cols or cols, cols)
    if high * wide <= limit:
        # whole groups: rows of them if they fit, else as many side by side as do
        width = cols if high * cols <= limit else limit // high // wide * wide
        height = limit // width // high * high
        yield from (Block(pair, matrix, r, c) for r in _steps(rows, height) for c in _steps(cols, width))
        return
    for group in _steps(rows, high):  # as wide as the matrix, since only groups of columns are narrower, and they fit
        width = min(cols, limit)
        boxes = [
            ((group[0] + a, group[0] + b), c)
            for a, b in _steps(group[1] - group[0], limit // width)
            for c in _steps(cols, width)
        ]
        unit = Unit(len(boxes))
        yield from (Block(pair, matrix, r, c, unit, measure=True) for r, c in boxes)
        yield from (Block(pair, matrix, *box, unit, scales=not n) for n, box in enumerate(boxes))


def _steps(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, length)) for start in range(0, length, step))


class Comparison:
    """Compares pairs with several threads, in bounded memory."""

    def __init__(self, made: Files, source: Files, staging_bytes: int, threads: int | None) -> None:
        check_options(staging_bytes, threads)
        self.made, self.source = made, source
        room = staging_bytes // _ELEMENT_BYTES
        count = min(threads or default_threads(), max(1, room // _LEAST_ELEMENTS))
        self.limit = max(_LEAST_ELEMENTS, min(TILE_ELEMENTS, 1 << (room // count).bit_length() - 1))
        self.ring: Ring[Block] = Ring(count)
        self._lock = threading.Lock()

    def add(self, pair: Pair, differing: int, signal: float = 0.0, noise: float = 0.0) -> None:
        with self._lock:
            pair.differing_bytes += differing
            pair.signal += signal
            pair.noise += noise

    def fold(self, unit: Unit, amax: Tensor) -> None:
        """Take the amax of one of a unit's blocks."""

        def change() -> None:
            unit.amax = torch.maximum(unit.amax, amax)
            unit.left -= 1

        self.ring.update(change)

    def amax(self, unit: Unit) -> Tensor:
        """Wait for all blocks of a unit."""
        self.ring.wait_for(lambda: not unit.left)
        return unit.amax


class Worker:
    """A thread that compares blocks."""

    def __init__(self, job: Comparison) -> None:
        torch.set_num_threads(1)
        self._job = job

        def memory(itemsize: int) -> tuple[Tensor, memoryview]:
            buffer = torch.empty(job.limit * itemsize, dtype=torch.uint8)
            return buffer, memoryview(buffer.numpy())  # type: ignore[arg-type]

        self._theirs, self._mine, self._cells = memory(4), memory(2), memory(4)
        self._expected = torch.empty(job.limit, dtype=torch.uint8)
        self._wide, self._error = (torch.empty(job.limit, dtype=torch.float32) for _ in range(2))

    def handle(self, block: Block) -> int:
        if block.pair.scheme is None and block.pair.there.coding is None:
            return self._compare_bytes(block)
        with torch.no_grad():
            if block.pair.scheme is None:
                return self._compare_decoded(block)
            if block.pair.passed:
                return self._compare_passed(block, block.pair.scheme)
            return self._compare(block, block.pair.scheme)

    def close(self) -> None:
        pass

    def _compare_bytes(self, block: Block) -> int:
        """Bytes as they are in the files: for dtypes that torch lacks, too."""
        (start, stop), pair = block.rows, block.pair
        for files, info, (_, view) in (
            (self._job.made, pair.here, self._mine),
            (self._job.source, pair.there, self._theirs),
        ):
            files.read_into(info.shard, view[: stop - start], info.offset + start)
        self._job.add(pair, differing(self._mine[0][: stop - start], self._theirs[0][: stop - start]))
        return stop - start

    def _compare_decoded(self, block: Block) -> int:
        """What codes stand for, rounded to bf16."""
        pair = block.pair
        weight, _, nbytes = self._weight(block)
        box = _piece(block.matrix, pair.shape[-2:], block.rows, block.cols)
        read = self._job.made.read_piece(pair.here, box, self._mine[1])
        wanted = weight.to(pair.here.dtype).contiguous().view(-1).view(torch.uint8)
        self._job.add(pair, differing(wanted, self._mine[0][:read]))
        return nbytes

    def _compare_passed(self, block: Block, scheme: Scheme) -> int:
        """Codes and scales as the source has them."""
        if block.measure:
            return 0
        pair = block.pair
        found, nbytes = self._encoded(block)
        box = _piece(block.matrix, pair.shape[-2:], block.rows, block.cols)
        scale = schemes.to_stored(found.grid(scheme, (0, 0)), scheme)
        wrong = self._found_scales(block, scale, scheme)[1] if block.scales else 0
        codes = found.unpack().contiguous().view(torch.uint8).view(-1)
        self._job.add(pair, wrong + differing(codes, self._numbers_of(pair, box)))
        return nbytes

    def _numbers_of(self, pair: Pair, box: Piece) -> Tensor:
        """The bytes of what was made, in a box."""
        self._job.made.read_piece(pair.here, box, self._mine[1])
        mine = self._mine[0][: box.numel]
        if pair.is_packed:
            packing.flip(mine.view(torch.int8))
        return mine

    def _encoded(self, block: Block) -> tuple[Encoded, int]:
        pair = block.pair
        there, coding = pair.source_box(block.matrix, block.rows, block.cols), pair.there.coding
        assert coding is not None
        stored = stored_piece(there, coding)
        assert stored is not None
        return read_encoded(self._job.source, pair.there, stored, self._theirs[0])

    def _weight(self, block: Block) -> tuple[Tensor, Tensor | None, int]:
        """The weights of a box of the source, the unit of `lossless_scale`, and the bytes that were read."""
        pair = block.pair
        if pair.there.coding is not None:
            found, nbytes = self._encoded(block)
            return found.decode(whole("", found.shape), self._decoded), found.unit, nbytes
        there = pair.source_box(block.matrix, block.rows, block.cols)
        nbytes = self._job.source.read_piece(pair.there, there, self._theirs[1])
        return there.from_file_order(self._theirs[0][:nbytes].view(pair.there.dtype)), None, nbytes

    @functools.cached_property
    def _decoded(self) -> Tensor:
        """Memory for what codes stand for."""
        return torch.empty(self._job.limit, dtype=torch.float32)

    def _compare(self, block: Block, scheme: Scheme) -> int:
        pair, job = block.pair, self._job
        box = _piece(block.matrix, pair.shape[-2:], block.rows, block.cols)
        weight, unit, nbytes = self._weight(block)
        if block.unit is None or block.measure:
            scratch = self._wide.view(weight.dtype)
            amax = schemes.group_amax(weight, scheme, scratch=scratch)
        if block.measure:
            assert block.unit is not None
            job.fold(block.unit, amax)
            return 0
        if block.unit is not None:
            amax = job.amax(block.unit)
        if scheme.packed:
            self._compare_packed(block, box, weight, schemes.scale_from_amax(amax, scheme))
            return nbytes
        scale = lossless_scale(amax, unit) if pair.lossless else schemes.scale_from_amax(amax, scheme)
        found, wrong = self._found_scales(block, schemes.to_stored(scale, scheme), scheme)
        mine = self._numbers_of(pair, box)
        expected = self._expected[: box.numel].view(scheme.dtype).view(box.size)
        schemes.quantize_into(expected, weight, scale, scheme, scratch=self._wide)
        wrong = wrong if block.scales else 0
        wrong += differing(expected.view(torch.uint8).view(-1), mine)
        error, wide = (memory[: box.numel].view(box.size) for memory in (self._error, self._wide))
        np.take(_numbers(scheme.dtype), mine.view(box.size).numpy(), out=error.numpy(), mode="clip")
        error.mul_(schemes.expand_scale(found, box.size, scheme)).sub_(wide.copy_(weight))
        job.add(pair, wrong, _energy(wide), _energy(error))
        return nbytes

    def _compare_packed(self, block: Block, box: Piece, weight: Tensor, scale: Tensor) -> None:
        """Numbers that are packed, the scales among them, and that of all."""
        pair, job = block.pair, self._job
        assert pair.scale is not None
        assert pair.whole_scale is not None
        codes, cells = (self._part(box, pair.shape, number) for number in range(2))
        read = job.made.read_piece(pair.here, codes, self._mine[1])
        cell_bytes = job.made.read_piece(pair.scale, cells, self._cells[1])
        mine = Packed(self._mine[0][:read].view(codes.size), self._cells[0][:cell_bytes].view(cells.size).view(E4M3))
        found = job.made.read_values(pair.whole_scale, whole("", pair.whole_scale.shape))
        expected = Packed(*(torch.empty(part.size, dtype=torch.uint8) for part in (codes, cells)))
        nvfp4.quantize_into(Packed(expected.codes, expected.scales.view(E4M3)), weight, scale, scratch=self._wide)
        wrong = sum(differing(a.view(-1), b.view(torch.uint8).view(-1)) for a, b in zip(expected, mine, strict=True))
        if block.scales:
            wrong += differing(found.view(torch.uint8), (1 / scale).view(1).view(torch.uint8))
        error, wide = (memory[: box.numel].view(box.size) for memory in (self._error, self._wide))
        nvfp4.widen(mine, error).div_(found).sub_(wide.copy_(weight))
        job.add(pair, wrong, _energy(wide), _energy(error))

    def _part(self, box: Piece, shape: Sequence[int], number: int) -> Piece:
        """A box of a matrix in the tensor of its codes (0), or of the scales of its groups (1)."""
        (*_, width), off, size = (Packed.boxes(each)[number] for each in (shape, box.dst_off, box.size))
        first = box.src_off // shape[-1]  # row
        return Piece(off, size, "", first * width + off[-1], (width, 1))

    def _found_scales(self, block: Block, wanted: Tensor, scheme: Scheme) -> tuple[Tensor, int]:
        """The scales on disk of a block's groups, as float32, and how many of their bytes are not those wanted."""
        info = block.pair.scale
        assert info is not None
        rows, cols = block.pair.shape[-2:]
        grid = scheme.cells(rows, cols)
        first = (block.rows[0] // (scheme.group_rows or rows), block.cols[0] // (scheme.group_cols or cols))
        along = [(start, start + n) for start, n in zip(first, wanted.shape, strict=True)]
        nbytes = self._job.made.read_piece(info, _piece(block.matrix, grid, *along), self._cells[1])
        raw = self._cells[0][:nbytes]
        wanted = wanted.to(info.dtype) if info.dtype == torch.bfloat16 else wanted  # exact
        return raw.view(wanted.dtype).view(wanted.shape), differing(raw, wanted.contiguous().view(torch.uint8).view(-1))


def _piece(matrix: int, shape: tuple[int, ...], rows: tuple[int, int], cols: tuple[int, int]) -> Piece:
    """A box of one matrix of a stack."""
    height, width = shape
    size = (rows[1] - rows[0], cols[1] - cols[0])
    return Piece((rows[0], cols[0]), size, "", (matrix * height + rows[0]) * width + cols[0], (width, 1))


def differing(a: Tensor, b: Tensor) -> int:
    """How many bytes of two flat tensors of bytes are not the same."""
    return int(np.count_nonzero(a.numpy() != b.numpy()))  # several times faster than torch


def _energy(values: Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))
