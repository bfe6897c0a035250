"""What becomes of a block on an accelerator: copied there at once, quantized where it is, placed.

All launching is done by one thread, since a dozen that launch mostly wait for each other (measured: 28.6 GB took 5.5 s
with sixteen, 3.7 s with four). What it costs is the number of launches: scales are computed for a block, not for a
chunk. Blocks go round a few streams (*lanes*), so that one is copied while another is quantized. The thread never
waits for the device: whether all weights were finite is looked at once, at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dtypes, schemes
from .blocks import Block, Part
from .checkpoint import Checkpoint
from .chunks import Chunk, Work
from .errors import WeightError
from .geometry import Geometry
from .press import describe_nonfinite
from .ring import Ring, Slot
from .schemes import Scheme
from .sinks import Destination, Sink

#: how many blocks' amax are in one allocation
_PAGE = 4096


class Lane:
    """A stream of the device, and the memory into which it copies blocks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.staged = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, Tensor] = {}
        # torch.cuda (also for ROCm) and torch.xpu; a device without streams does one thing after the other
        self._backend: Any = getattr(torch, device.type)
        self._queue = (
            self._backend.Stream(device) if device.type != "cpu" and hasattr(self._backend, "Stream") else None
        )
        self.follow()

    def __enter__(self) -> Lane:
        self._context = contextlib.nullcontext() if self._queue is None else self._backend.stream(self._queue)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def follow(self) -> None:
        """Begin only after what the caller's stream has been given so far."""
        if self._queue is not None:
            self._queue.wait_stream(self._backend.current_stream(self.device))

    def precede(self) -> None:
        """Let the caller's stream go on only after what this lane has been given so far."""
        if self._queue is not None:
            self._backend.current_stream(self.device).wait_stream(self._queue)

    def wait(self) -> None:
        """Block until the lane is idle."""
        if self._queue is not None:
            self._queue.synchronize()

    def copy(self, slot: Slot, nbytes: int) -> None:
        """Copy a slot's bytes to the device; the slot is busy until they have left it."""
        self.staged[:nbytes].copy_(slot.buffer[slot.start : slot.start + nbytes], non_blocking=True)
        if self._queue is not None:
            slot.busy = self._backend.Event()
            slot.busy.record(self._queue)

    def elements(self, block: Block, part: Part) -> Tensor:
        """A chunk of the block that was copied, with the axes of its parameter (a view)."""
        piece, dtype = part.chunk.piece, dtypes.MOVED[part.dtype_name]
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.staged[: self.staged.numel() // 8 * 8].view(dtype)
        if block.offset is not None:
            return typed.as_strided(piece.size, piece.src_strides, part.start // dtype.itemsize)
        order = piece.file_order()
        in_file = typed[: piece.numel].view([piece.size[d] for d in order])
        return in_file.permute([order.index(d) for d in range(len(order))])


@dataclass(slots=True)
class _Open:
    """A placement of which some chunks have come."""

    destination: Destination
    left: int  # elements
    amax: Tensor | None = None  # float32 grid, for groups that span chunks


class DevicePress:
    """Quantizes and places blocks, one after another."""

    def __init__(self, checkpoint: Checkpoint, geometry: Geometry, sink: Sink, ring: Ring[Any]) -> None:
        self._checkpoint, self._device, self._sink, self._ring = checkpoint, geometry.device, sink, ring
        self._lanes = [Lane(geometry.slot_bytes, geometry.device) for _ in range(geometry.lanes)]
        self._turn = 0
        self._open: dict[str, _Open] = {}
        # the largest amax of every so many chunks, and which these are: not finite if a weight was not
        self._worst: list[Tensor] = []
        self._watched: list[list[Chunk]] = []
        self._scratch: Tensor | None = None  # where the sink has no memory to quantize into

    def take(self, block: Block, slot: Slot) -> int:
        """Do what the plan says with a block that was read into ``slot``; returns the bytes placed by it."""
        lane = self._lanes[0 if block.in_order else self._turn]
        self._turn = (self._turn + 1) % len(self._lanes)
        whole: list[tuple[Chunk, Tensor]] = []
        with torch.no_grad(), lane:
            lane.copy(slot, block.nbytes)
            for part in block.parts:
                chunk, values = part.chunk, lane.elements(block, part)
                if chunk.work is Work.COPY:
                    self._opened(chunk).destination.put(chunk.piece, values)
                elif chunk.work is Work.QUANTIZE:
                    whole.append((chunk, values))
                elif chunk.work is Work.AMAX:
                    self._fold(chunk, values)
                else:
                    self._quantize(chunk, values, self._opened(chunk).amax)
            for scheme in dict.fromkeys(chunk.placement.scheme for chunk, _ in whole):
                self._quantize_together([item for item in whole if item[0].placement.scheme == scheme])
        return sum(self._done(part.chunk) for part in block.parts)

    def follow(self) -> None:
        """Let what comes next happen after what the caller's stream has been given (memory it has released)."""
        for lane in self._lanes:
            lane.follow()

    def precede(self) -> None:
        """Let the caller's stream see what has been placed."""
        for lane in self._lanes:
            lane.precede()

    def finish(self) -> None:
        """Wait for the device; raise if a weight was not finite."""
        self.close()
        if not self._watched:
            return
        finite = torch.isfinite(torch.cat(self._worst)[: len(self._watched)])
        if not bool(finite.all()):
            chunks = self._watched[int(torch.nonzero(~finite)[0])]
            raise WeightError(describe_nonfinite(self._checkpoint, [(c.placement, c.piece) for c in chunks]))

    def close(self) -> None:
        for lane in self._lanes:
            lane.wait()

    # -- placements ---------------------------------------------------------------------------------------------------

    def _opened(self, chunk: Chunk) -> _Open:
        name = chunk.placement.name
        if name not in self._open:
            destination = self._sink.open(chunk.placement, self._ring)
            self._open[name] = _Open(destination, math.prod(chunk.placement.shape))
        return self._open[name]

    def _done(self, chunk: Chunk) -> int:
        """Count a chunk; close its placement with the last one. Returns the bytes that are now in their place."""
        if chunk.work is Work.AMAX:
            return 0
        placement, state = chunk.placement, self._opened(chunk)
        placed = chunk.piece.numel * dtypes.moved_bits(placement.dtype_name) // 8
        state.left -= chunk.piece.numel
        if state.left:
            return placed
        del self._open[placement.name]
        state.destination.close()
        return placed + placement.scale_bytes

    # -- quantizing ---------------------------------------------------------------------------------------------------

    def _quantize_together(self, items: Sequence[tuple[Chunk, Tensor]]) -> None:
        """Chunks of one scheme, each of which holds whole scale groups: the scales of all are computed at once."""
        scheme = schemes.get(items[0][0].placement.scheme or "")
        grids = [tuple(cells.stop - cells.start for cells in chunk.cells) for chunk, _ in items]
        sizes = [math.prod(grid) for grid in grids]
        amax = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        for (chunk, values), grid, out in zip(items, grids, torch.split(amax, sizes), strict=True):
            schemes.group_amax(values, scheme, phase=chunk.phase, out=out.view(grid))
        self._watch([chunk for chunk, _ in items], amax)
        scale = schemes.scale_from_amax(amax, scheme)
        stored = schemes.to_stored(scale, scheme)
        cut = zip(items, grids, torch.split(scale, sizes), torch.split(stored, sizes), strict=True)
        for (chunk, values), grid, scale_part, stored_part in cut:
            self._place(chunk, values, scale_part.view(grid), stored_part.view(grid), scheme)

    def _fold(self, chunk: Chunk, values: Tensor) -> None:
        """The first reading of a chunk whose scale groups span several."""
        state, scheme = self._opened(chunk), schemes.get(chunk.placement.scheme or "")
        amax = schemes.group_amax(values, scheme, phase=chunk.phase)
        self._watch([chunk], amax)
        if state.amax is None:
            state.amax = torch.zeros(chunk.placement.scale_grid, dtype=torch.float32, device=self._device)
        region = state.amax[chunk.cells]
        region.copy_(torch.maximum(region, amax))

    def _quantize(self, chunk: Chunk, values: Tensor, amax: Tensor | None) -> None:
        """The second reading: lanes of these are the same one, so all of the first has gone before."""
        assert amax is not None
        scheme = schemes.get(chunk.placement.scheme or "")
        scale = schemes.scale_from_amax(amax[chunk.cells], scheme)
        self._place(chunk, values, scale, schemes.to_stored(scale, scheme), scheme)

    def _place(self, chunk: Chunk, values: Tensor, scale: Tensor, stored: Tensor, scheme: Scheme) -> None:
        destination, piece = self._opened(chunk).destination, chunk.piece
        destination.put_scale(chunk.cells, stored)
        out = destination.view(piece)
        if out is not None:
            schemes.quantize_into(out, values, scale, scheme, phase=chunk.phase)
            return
        if self._scratch is None:
            self._scratch = torch.empty(self._lanes[0].staged.numel() // 2, dtype=schemes.FP8, device=self._device)
        out = self._scratch[: piece.numel].view(piece.size)
        schemes.quantize_into(out, values, scale, scheme, phase=chunk.phase)
        destination.put(piece, out)

    def _watch(self, chunks: list[Chunk], amax: Tensor) -> None:
        """Remember whether anything is not finite."""
        at = len(self._watched) % _PAGE
        if not at:
            self._worst.append(torch.zeros(_PAGE, dtype=torch.float32, device=self._device))
        torch.amax(amax.view(-1), 0, out=self._worst[-1][at])
        self._watched.append(chunks)
