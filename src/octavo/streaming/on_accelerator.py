"""On an accelerator: a block is copied there at once, quantized where it is, and placed.

All launching is done by one thread, since a dozen that launch mostly wait for each other (measured: 28.6 GB took 5.5 s
with sixteen, 3.7 s with four). What it costs is the number of launches: `octavo.planning.blocks` keeps it small, and
scales are computed for a whole block. Blocks go round a few streams (*lanes*), so that one is copied while another is
quantized. The thread does not wait for the device: whether all weights were finite is looked at once, at the end (and
by an iterator before it hands anything out).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.codings import Coding
from ..elements.pieces import Piece
from ..errors import WeightError
from ..machine import usable_device
from ..numerics import schemes
from ..numerics.schemes import Scheme, Stored
from ..planning.blocks import Block, Read
from ..planning.budget import Budget, check_options
from ..planning.bundles import Bundle
from ..planning.chunks import Work
from . import coded_there
from .coded_there import PressThere
from .nonfinite import FiniteWatch, describe_nonfinite
from .placed import Placed
from .ring import Slot
from .sinks import enough_memory, quantize_to
from .staged import Staged, backend_of
from .workers import Workers


class Scales(NamedTuple):
    """The scales of several boxes; each grid is [..., row cells, column cells]."""

    amax: Tensor  # of all their groups, flat
    grids: list[Tensor]  # float32, a box each
    stored: list[Tensor]  # the same in the scheme's stored dtype


def scales_of(
    boxes: Sequence[Tensor], grids: Sequence[Sequence[int]], phases: Sequence[tuple[int, int]], scheme: Scheme
) -> Scales:
    """Compute the scales of all boxes at once: an amax each, and then a few operations for all together.

    Args:
        boxes: values [..., out, in] on one device; each holds whole scale groups.
        grids: the shape of each box's scales.
        phases: row and column of each box within its scale group.
    """
    sizes = [math.prod(grid) for grid in grids]
    amax = torch.empty(sum(sizes), dtype=torch.float32, device=boxes[0].device)

    def cut(flat: Tensor) -> list[Tensor]:
        return [part.view(grid) for part, grid in zip(torch.split(flat, sizes), grids, strict=True)]

    for values, phase, out in zip(boxes, phases, cut(amax), strict=True):
        schemes.group_amax(values, scheme, phase=phase, out=out)
    scale = schemes.scale_from_amax(amax, scheme)
    stored = schemes.to_stored(scale, scheme)
    found = cut(scale)
    return Scales(amax, found, found if stored is scale else cut(stored))


class Lane:
    """A stream of the device, and the memory into which it copies blocks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.staged = Staged(nbytes, device)
        self._wide: Tensor | None = None
        self.watch: FiniteWatch[list[Bundle]] = FiniteWatch(device)
        self._backend = backend_of(device)
        self._queue: Any = None if self._backend is None else self._backend.Stream(device)
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

    def require(self, nbytes: int) -> None:
        """Have room for a block: one of a few columns, which have a scale each, is larger than all others."""
        if nbytes > self.staged.bytes.numel():
            self.wait()
            self.staged = Staged(nbytes, self.device)

    def copy(self, slot: Slot, start: int, nbytes: int) -> None:
        """Copy a slot's bytes to the device; the slot is busy until they have left it."""
        source = slot.buffer[slot.start : slot.start + nbytes]
        self.staged.bytes[start : start + nbytes].copy_(source, non_blocking=self._queue is not None)
        if self._queue is not None:
            if self.device not in slot.events:
                slot.events[self.device] = self._backend.Event()
            slot.busy = slot.events[self.device]
            slot.busy.record(self._queue)

    def wide(self, nbytes: int) -> Tensor:
        """Memory for float32 numbers, for what no kernel does at once."""
        if self._wide is None:
            self._wide = torch.empty(nbytes // 4, dtype=torch.float32, device=self.device)
        return self._wide

    def values(self, bundle: Bundle) -> Tensor:
        """The values of a bundle that has been copied, with the axes of its parameter (a view)."""
        return self.staged.view(dtypes.MOVED[bundle.dtype_name], bundle.piece)

    def suspects(self) -> list[list[Bundle]]:
        """Wait; bundles, watched together since this was asked before, of which something was not finite."""
        self.wait()
        return self.watch.suspects()


class WarmUp:
    """Does what the first use of a device takes (its context, pinned memory, loading kernels) beside other work.

    It comes to half a second on a GPU, which building a model's skeleton and planning hide. Allocators of torch keep
    what is released here for the stream that follows.

    Entered, it begins; left, it waits, and raises a `DeviceError` if the device can't be used.
    """

    def __init__(
        self,
        device: torch.device,
        staging_bytes: int,
        threads: int | None,
        names: Iterable[str],
        others: Iterable[torch.device] = (),
    ) -> None:
        self._devices, self._names = [device, *(other for other in others if other.type != "cpu")], tuple(names)
        check_options(staging_bytes, threads)
        self._budget = Budget.on_accelerator(device, staging_bytes, threads) if device.type != "cpu" else None
        self._error: BaseException | None = None
        self._workers = Workers(f"that prepare {device}")

    def __enter__(self) -> WarmUp:
        if self._budget is not None:
            try:
                self._workers.start(self._run, "octavo-warm-up")
            except BaseException:
                self._workers.finish()
                raise
        return self

    def decode(self, codings: Iterable[Coding | None]) -> None:
        """Do what it takes to decode such sources, too."""
        found = [coding for coding in codings if coding is not None]
        if self._budget is not None and found:
            self._workers.start(functools.partial(self._compile, found), "octavo-compile")

    def _compile(self, codings: Sequence[Coding]) -> None:
        try:
            for device in self._devices:
                coded_there.rehearse(usable_device(device), self._names, codings)
        except BaseException as error:  # raised by who waits
            self._error = self._error or error

    def __exit__(self, kind: Any, *_: Any) -> None:
        first = self._workers.finish() or (self._error if kind is None else None)
        try:
            if first is not None:
                raise first
        finally:
            del first

    def _run(self) -> None:
        try:
            assert self._budget is not None
            _begin_driver(self._budget.device)
            slots: list[Slot] = []
            for device in self._devices:
                usable_device(device)
                with enough_memory(device, "staging; a smaller staging_bytes needs less"):
                    slots = slots or [Slot(self._budget.slot_bytes, pinned=True) for _ in range(self._budget.slots)]
                    rehearse(device, self._names)
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
        lane.watch.add(torch.zeros(1, dtype=torch.float32, device=device), [])
        lane.suspects()


def _begin_driver(device: torch.device) -> None:
    """Initialise CUDA's driver, during which torch would let no other thread run (0.2 s on an H100)."""
    if device.type == "cuda" and torch.version.cuda is not None:
        with contextlib.suppress(OSError, AttributeError):  # then torch does it, or says what is wrong
            ctypes.CDLL("libcuda.so.1").cuInit(0)


class DevicePress:
    """Quantizes and places blocks, one after another."""

    def __init__(self, checkpoint: Checkpoint, budget: Budget, placed: Placed) -> None:
        self._checkpoint, self._device, self._placed = checkpoint, budget.device, placed
        self._budget = budget
        schemes.warm_up(budget.device)  # what all lanes share must be there before any of them
        self._lanes = [Lane(budget.block_bytes, budget.device) for _ in range(budget.lanes)]
        self._decoding: dict[int, PressThere] = {}  # lane -> what decodes in it
        self._turn = 0
        self._wide_bytes = budget.slot_bytes // 2  # of the two slots that all lanes have beside their blocks
        # where the sink has no memory to quantize into (it takes the bytes at once)
        self._scratch: Tensor | None = None

    def take(self, read: Read, slot: Slot) -> int:
        """Copy what was read into ``slot``; do what the plan says with a block that has come to its end.

        Returns the bytes that are placed by it.
        """
        block = read.block
        if not read.start:
            self._turn = 0 if block.in_order else (self._turn + 1) % len(self._lanes)
        lane = self._lanes[self._turn]
        with lane:
            lane.require(block.nbytes)
            lane.copy(slot, read.start, read.nbytes)
            return self._press(block, lane) if read.last else 0

    @torch.no_grad()
    def _press(self, block: Block, lane: Lane) -> int:
        whole: dict[Scheme, list[tuple[Bundle, Tensor]]] = {}
        for bundle in block.bundles:  # in the order of the plan, though not done in that order
            self._placed.open(bundle.placement)
        for bundle in block.bundles:
            if not bundle.piece.numel:  # its placement may be complete already
                continue
            if bundle.coded is not None:
                self._decoder(lane).place(bundle, bundle.coded, lane.staged)
                continue
            values = lane.values(bundle)
            if bundle.work is Work.COPY:
                mine = bundle.placement.partition(bundle.piece)
                assert mine is not None
                self._placed.destination(bundle.placement).put(mine.piece, mine.of(values))
            elif bundle.work is Work.QUANTIZE:
                whole.setdefault(bundle.placement.rule, []).append((bundle, values))
            elif bundle.work is Work.AMAX:
                self._fold(bundle, values, lane)
            else:
                self._quantize(bundle, values, lane)
        for scheme, items in whole.items():
            self._quantize_together(items, scheme, lane)
        return sum(self._placed.done(bundle.placement, bundle.work, bundle.piece) for bundle in block.bundles)

    def _decoder(self, lane: Lane) -> PressThere:
        """What decodes in the lane whose turn it is."""
        if self._turn not in self._decoding:
            self._decoding[self._turn] = PressThere(self._checkpoint, self._budget, self._placed, lane.watch)
        return self._decoding[self._turn]

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
            for bundles in lane.suspects():
                found = [(bundle.placement, chunk.piece) for bundle in bundles for chunk in bundle.chunks]
                raise WeightError(describe_nonfinite(self._checkpoint, found))

    def close(self) -> None:
        """Wait for the device, whatever happens meanwhile."""
        with contextlib.ExitStack() as stack:
            for lane in self._lanes:
                stack.callback(lane.wait)

    # -- quantizing ---------------------------------------------------------------------------------------------------

    def _quantize_together(self, items: Sequence[tuple[Bundle, Tensor]], scheme: Scheme, lane: Lane) -> None:
        """Boxes that hold whole scale groups: the scales of all are computed at once."""
        grids = [tuple(cells.stop - cells.start for cells in bundle.cells) for bundle, _ in items]
        scales = scales_of([values for _, values in items], grids, [bundle.phase for bundle, _ in items], scheme)
        lane.watch.add(scales.amax, [bundle for bundle, _ in items])
        for (bundle, values), scale, stored in zip(items, scales.grids, scales.stored, strict=True):
            self._place(bundle, values, scale, stored, scheme, lane)

    def _fold(self, bundle: Bundle, values: Tensor, lane: Lane) -> None:
        """The first reading of a bundle whose scale groups span several."""
        amax = schemes.group_amax(values, bundle.placement.rule, phase=bundle.phase)
        lane.watch.add(amax, [bundle])
        self._placed.fold(bundle.placement, bundle.cells, amax)

    def _quantize(self, bundle: Bundle, values: Tensor, lane: Lane) -> None:
        """The second reading: it is in the same lane as the first, so all of that has gone before."""
        scheme = bundle.placement.rule
        scale = schemes.scale_from_amax(self._placed.amax(bundle.placement, bundle.cells), scheme)
        self._place(bundle, values, scale, schemes.to_stored(scale, scheme), scheme, lane)

    def _place(self, bundle: Bundle, values: Tensor, scale: Tensor, stored: Tensor, scheme: Scheme, lane: Lane) -> None:
        destination = self._placed.destination(bundle.placement)
        mine = bundle.placement.partition(bundle.piece, bundle.cells, bundle.phase)
        assert mine is not None
        values, scale = mine.of(values), mine.of_scales(scale)
        destination.put_scale(mine.cells, mine.of_scales(stored))
        wide = None if scheme.dtype.is_floating_point else lane.wide(self._wide_bytes)

        def quantize(out: Stored) -> None:
            schemes.quantize_into(out, values, scale, scheme, phase=mine.phase, scratch=wide)

        view = destination.view(mine.piece)
        quantize_to(destination, mine.piece, view, lambda: self._out(mine.piece, scheme), quantize)

    def _out(self, piece: Piece, scheme: Scheme) -> Stored:
        """Scratch memory into which a box is quantized."""
        if self._scratch is None:
            nbytes = self._lanes[0].staged.bytes.numel() // 2
            self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return scheme.scratch(self._scratch, piece.size)
