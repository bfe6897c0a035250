"""On an accelerator: a block is copied there at once, quantized where it is, and placed.

All launching is done by one thread, since a dozen that launch mostly wait for each other (measured: 28.6 GB took 5.5 s
with sixteen, 3.7 s with four). What it costs is the number of launches: `octavo.planning.blocks` keeps it small, and
scales are
computed for a whole block. Blocks go round a few streams (*lanes*), so that one is copied while another is quantized.
The thread does not wait for the device: whether all weights were finite is looked at once, at the end (and by an
iterator before it hands anything out).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..errors import WeightError
from ..machine import usable_device
from ..numerics import schemes
from ..numerics.schemes import Scheme
from ..planning.blocks import Block, Box, Read
from ..planning.budget import Budget, check_options
from ..planning.chunks import Work
from .nonfinite import describe_nonfinite
from .ring import Ring, Slot
from .sinks import Destination, Sink, enough_memory

#: how many blocks' amax are in one allocation
_PAGE = 4096


class Lane:
    """A stream of the device, and the memory into which it copies blocks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.staged = torch.empty(-(-nbytes // 8) * 8, dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, Tensor] = {}
        # the largest amax of some boxes each, and which these are: not finite if a weight was not
        self._worst: list[Tensor] = []
        self._watched: list[list[Box]] = []
        self._checked = 0
        # torch.cuda (also for ROCm) and torch.xpu; a device without streams does one thing after the other
        self._backend: Any = getattr(torch, device.type)
        has_streams = device.type != "cpu" and hasattr(self._backend, "Stream")
        self._queue: Any = self._backend.Stream(device) if has_streams else None
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

    def copy(self, slot: Slot, start: int, nbytes: int) -> None:
        """Copy a slot's bytes to the device; the slot is busy until they have left it."""
        source = slot.buffer[slot.start : slot.start + nbytes]
        self.staged[start : start + nbytes].copy_(source, non_blocking=self._queue is not None)
        if self._queue is not None:
            slot.busy = slot.event = slot.event or self._backend.Event()
            slot.event.record(self._queue)

    def values(self, box: Box) -> Tensor:
        """What has been copied of a box, with the axes of its parameter (a view)."""
        dtype = dtypes.MOVED[box.dtype_name]
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.staged.view(dtype)
        return typed.as_strided(box.piece.size, box.piece.src_strides, box.piece.src_off)

    def watch(self, boxes: list[Box], amax: Tensor) -> None:
        """Remember, on the device, whether anything is not finite."""
        at = len(self._watched) % _PAGE
        if not at:
            self._worst.append(torch.zeros(_PAGE, dtype=torch.float32, device=self.device))
        torch.amax(amax.view(-1), 0, out=self._worst[-1][at])
        self._watched.append(boxes)

    def suspects(self) -> list[Box]:
        """Waits; the first boxes since the last call of which something was not finite."""
        self.wait()
        first, self._checked = self._checked, len(self._watched)
        if first == self._checked:
            return []
        finite = torch.isfinite(torch.cat(self._worst[first // _PAGE :]))[: self._checked - first // _PAGE * _PAGE]
        bad = torch.nonzero(~finite[first % _PAGE :])
        return self._watched[first + int(bad[0])] if len(bad) else []


class WarmUp:
    """Does what the first use of a device takes (its context, pinned memory, loading kernels) beside other work.

    It comes to half a second on a GPU, which building a model's skeleton and planning hide. Allocators of torch keep
    what is released here for the stream that follows.

    Entered, it begins; left, it waits, and raises a `DeviceError` if the device can't be used.
    """

    def __init__(self, device: torch.device, staging_bytes: int, threads: int | None, names: Iterable[str]) -> None:
        self._device, self._names = device, tuple(names)
        check_options(staging_bytes, threads)
        self._budget = Budget.on_accelerator(device, staging_bytes, threads) if device.type != "cpu" else None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="octavo-warm-up", daemon=True)

    def __enter__(self) -> None:
        if self._budget is not None:
            self._thread.start()

    def __exit__(self, kind: Any, *_: Any) -> None:
        while self._thread.is_alive():
            self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        try:
            assert self._budget is not None
            _begin_driver(self._device)
            usable_device(self._device)
            with enough_memory(self._device, "staging; a smaller staging_bytes needs less"):
                slots = [Slot(self._budget.slot_bytes, pinned=True) for _ in range(self._budget.slots)]
                rehearse(self._device, self._names)
            del slots
        except BaseException as error:  # raised by who waits
            self._error = error


def rehearse(device: torch.device, names: Iterable[str]) -> None:
    """Do on ``device`` what a stream of these schemes does, so that its kernels are loaded.

    All dtypes are said: building a model changes torch's default for every thread.
    """
    weight = torch.zeros((256, 256), dtype=torch.bfloat16, device="cpu")
    for name in names:
        schemes.quantize(weight.to(device), name)
    lane = Lane(0, device)
    with lane:
        lane.watch([], torch.zeros(1, dtype=torch.float32, device=device))
        lane.suspects()


def _begin_driver(device: torch.device) -> None:
    """Initialise CUDA's driver, during which torch would let no other thread run (0.2 s on an H100)."""
    if device.type == "cuda" and torch.version.cuda is not None:
        with contextlib.suppress(OSError, AttributeError):  # then torch does it, or says what is wrong
            ctypes.CDLL("libcuda.so.1").cuInit(0)


@dataclass(slots=True)
class _Open:
    """A placement of which some chunks have come."""

    destination: Destination
    left: int  # elements
    amax: Tensor | None = None  # float32 grid, for groups that span chunks


class DevicePress:
    """Quantizes and places blocks, one after another."""

    def __init__(self, checkpoint: Checkpoint, budget: Budget, sink: Sink, ring: Ring[Any]) -> None:
        self._checkpoint, self._device, self._sink, self._ring = checkpoint, budget.device, sink, ring
        schemes.warm_up(budget.device)  # what all lanes share must be there before any of them
        self._lanes = [Lane(budget.block_bytes, budget.device) for _ in range(budget.lanes)]
        self._turn = 0
        self._open: dict[str, _Open] = {}
        self._scratch: Tensor | None = (
            None  # where the sink has no memory to quantize into (it takes the bytes at once)
        )

    def take(self, read: Read, slot: Slot) -> int:
        """Copy what was read into ``slot``; do what the plan says with a block that has come to its end.

        Returns the bytes that are placed by it.
        """
        block = read.block
        if not read.start:
            self._turn = 0 if block.in_order else (self._turn + 1) % len(self._lanes)
        lane = self._lanes[self._turn]
        with lane:
            lane.copy(slot, read.start, read.nbytes)
            return self._press(block, lane) if read.last else 0

    @torch.no_grad()
    def _press(self, block: Block, lane: Lane) -> int:
        whole: dict[str, list[tuple[Box, Tensor]]] = {}
        for box in block.boxes:  # in the order of the plan, though not done in that order
            self._opened(box)
        for box in block.boxes:
            values = lane.values(box)
            if box.work is Work.COPY:
                self._opened(box).destination.put(box.piece, values)
            elif box.work is Work.QUANTIZE:
                whole.setdefault(box.placement.scheme or "", []).append((box, values))
            elif box.work is Work.AMAX:
                self._fold(box, values, lane)
            else:
                self._quantize(box, values)
        for scheme, items in whole.items():
            self._quantize_together(items, schemes.get(scheme), lane)
        return sum(self._done(box) for box in block.boxes)

    def follow(self) -> None:
        """Let what comes next happen after what the caller's stream has been given (memory it has released)."""
        for lane in self._lanes:
            lane.follow()

    def precede(self) -> None:
        """Let the caller's stream see what has been placed."""
        for lane in self._lanes:
            lane.precede()

    def check(self) -> None:
        """Wait for the device; raise if a weight since the last check was not finite."""
        for lane in self._lanes:
            found = [(box.placement, chunk.piece) for box in lane.suspects() for chunk in box.chunks]
            if found:
                raise WeightError(describe_nonfinite(self._checkpoint, found))

    def close(self) -> None:
        """Wait for the device, whatever happens meanwhile."""
        with contextlib.ExitStack() as stack:
            for lane in self._lanes:
                stack.callback(lane.wait)

    # -- placements ---------------------------------------------------------------------------------------------------

    def _opened(self, box: Box) -> _Open:
        name = box.placement.name
        if name not in self._open:
            destination = self._sink.open(box.placement, self._ring)
            self._open[name] = _Open(destination, math.prod(box.placement.shape))
        return self._open[name]

    def _done(self, box: Box) -> int:
        """Count a box; close its placement with the last one. Returns the bytes that are now in their place."""
        if box.work is Work.AMAX:
            return 0
        placement, state = box.placement, self._opened(box)
        placed = box.piece.numel * dtypes.moved_bits(placement.dtype_name) // 8
        state.left -= box.piece.numel
        if state.left:
            return placed
        del self._open[placement.name]
        state.destination.close()
        return placed + placement.scale_bytes

    # -- quantizing ---------------------------------------------------------------------------------------------------

    def _quantize_together(self, items: Sequence[tuple[Box, Tensor]], scheme: Scheme, lane: Lane) -> None:
        """Boxes that hold whole scale groups: the scales of all are computed at once."""
        grids = [tuple(cells.stop - cells.start for cells in box.cells) for box, _ in items]
        sizes = [math.prod(grid) for grid in grids]
        amax = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        for (box, values), grid, out in zip(items, grids, torch.split(amax, sizes), strict=True):
            schemes.group_amax(values, scheme, phase=box.phase, out=out.view(grid))
        lane.watch([box for box, _ in items], amax)
        scale = schemes.scale_from_amax(amax, scheme)
        stored = schemes.to_stored(scale, scheme)
        scales = [part.view(grid) for part, grid in zip(torch.split(scale, sizes), grids, strict=True)]
        if stored is not scale:
            stored_scales = [part.view(grid) for part, grid in zip(torch.split(stored, sizes), grids, strict=True)]
        else:
            stored_scales = scales
        for (box, values), mine, kept in zip(items, scales, stored_scales, strict=True):
            self._place(box, values, mine, kept, scheme)

    def _fold(self, box: Box, values: Tensor, lane: Lane) -> None:
        """The first reading of a box whose scale groups span several."""
        state, scheme = self._opened(box), schemes.get(box.placement.scheme or "")
        amax = schemes.group_amax(values, scheme, phase=box.phase)
        lane.watch([box], amax)
        if state.amax is None:
            state.amax = torch.zeros(box.placement.scale_grid, dtype=torch.float32, device=self._device)
        region = state.amax[box.cells]
        region.copy_(torch.maximum(region, amax))

    def _quantize(self, box: Box, values: Tensor) -> None:
        """The second reading: it is in the same lane as the first, so all of that has gone before."""
        amax, scheme = self._opened(box).amax, schemes.get(box.placement.scheme or "")
        assert amax is not None
        scale = schemes.scale_from_amax(amax[box.cells], scheme)
        self._place(box, values, scale, schemes.to_stored(scale, scheme), scheme)

    def _place(self, box: Box, values: Tensor, scale: Tensor, stored: Tensor, scheme: Scheme) -> None:
        destination, piece = self._opened(box).destination, box.piece
        destination.put_scale(box.cells, stored)
        out = destination.view(piece)
        if out is not None:
            # nothing else is made of these bytes, so they may be clamped where they are
            schemes.quantize_into(out, values, scale, scheme, phase=box.phase, clamped=values)
            return
        if self._scratch is None:
            self._scratch = torch.empty(self._lanes[0].staged.numel() // 2, dtype=schemes.FP8, device=self._device)
        out = self._scratch[: piece.numel].view(piece.size)
        schemes.quantize_into(out, values, scale, scheme, phase=box.phase, clamped=values)
        destination.put(piece, out)
