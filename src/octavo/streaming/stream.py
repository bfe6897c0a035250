"""The loop: read a chunk, quantize it, place it. Executes a plan and decides nothing.

On a CPU, threads of the ring read chunks into slots, and a press of each computes scales and FP8 bytes and writes them
where the sink says. On an accelerator they read blocks of chunks, and the caller's thread launches the rest. Chunks of
one parameter may finish in any order; their bytes don't depend on it.

Where scale groups span chunks (a tensor-wide scale, a transposed source), the plan has each chunk read twice: first for
the amax, then, when all of the group's have been seen, to quantize.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..errors import CheckpointError, DeviceError, OctavoError, boundary
from ..machine import now
from ..planning.blocks import NOTHING, Block, Read, cut_in_turn, cut_reads
from ..planning.budget import Budget
from ..planning.chunks import Chunk, Work, cut_placements
from ..planning.placement import Placement
from ..planning.plan import Plan
from .checks import Checks
from .coded import Encoded, read_encoded
from .files import Files
from .on_accelerator import DevicePress
from .on_cpu import Press
from .placed import Placed
from .ring import TICK_S, Ring, SingleThreadedTorch, Slot
from .sinks import IteratorSink, Sink, Storage, enough_memory


@dataclass
class Tally:
    """Measurements of a stream: seconds, summed over threads, and bytes."""

    read_s: float = 0.0
    quantize_s: float = 0.0
    read_bytes: int = 0
    placed_bytes: int = 0


def execute(
    checkpoint: Checkpoint,
    plan: Plan,
    sink: Sink,
    *,
    threads: int | None = None,
    tally: Tally | None = None,
    progress: Callable[[int, int], None] | None = None,
    direct_io: bool | None = None,
    checks: Checks | None = None,
) -> Tally:
    """Execute a plan whose placements may be on accelerators and on the CPU; errors and progress as for `Stream.run`.

    Args:
        direct_io: concerns what goes to accelerators; without any, it is an error.
    """
    tally, parts, before, others = tally or Tally(), plan.parts(), 0, plan.stored_bytes
    for number, part in enumerate(parts):
        direct = direct_io if not number else None
        stream = Stream(checkpoint, part, sink, threads=threads, tally=tally, direct_io=direct, checks=checks)
        others -= part.stored_bytes

        def overall(done: int, total: int, before: int = before, others: int = others) -> None:
            if progress:
                progress(before + done, before + total + others)

        stream.run(overall)
        before += stream.total_bytes
    return tally


class Stream:
    """One execution of a plan into a sink: to the CPU, or to accelerators."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        sink: Sink,
        *,
        threads: int | None = None,
        slot_bytes: int | None = None,
        budget: Budget | None = None,
        tally: Tally | None = None,
        direct_io: bool | None = None,
        checks: Checks | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.sink = checkpoint, plan, sink
        self.budget = budget or Budget.fit(plan.placements, plan.staging_bytes, threads, slot_bytes)
        self.ring: Ring[Any] = Ring(self.budget.threads, f"reading {checkpoint.path}")
        if direct_io and not self.budget.lanes:
            raise DeviceError("direct_io=True is for loading to an accelerator; None or False reads as a CPU does")
        if direct_io and self.budget.read_bytes == self.budget.slot_bytes:
            raise DeviceError(f"direct_io=True needs more staging_bytes than {plan.staging_bytes:,}")
        self.files = Files.of(checkpoint, direct_io if self.budget.lanes else False, checks)
        self.tally = tally or Tally()  # several streams of one job share theirs
        self._placed = Placed(sink, self.ring)
        self._again_bytes = 0  # drawn to be read a second time
        self._torch = SingleThreadedTorch()
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        """Bytes to be read, as far as is known: cutting tells which are read twice."""
        return self.plan.stored_bytes + self._again_bytes

    def run(self, progress: Callable[[int, int], None] | None = None) -> Tally:
        """Execute the plan; on any error, all threads have ended and all files are closed when it is raised.

        Args:
            progress: called about ten times a second, in this thread, with bytes read and bytes in all.
        """

        def on_tick(done: int) -> None:
            if progress:
                progress(done, self.total_bytes)

        with boundary(self.checkpoint.path, CheckpointError):
            self._run(on_tick)
        return self.tally

    def _run(self, on_tick: Callable[[int], None]) -> None:
        try:
            self._torch.hold()
            if self.budget.lanes:
                ticked = now()
                with contextlib.closing(self._blocks()) as blocks:
                    for _ in blocks:
                        if now() - ticked > TICK_S:
                            ticked = now()
                            on_tick(self.ring.done_bytes)
                on_tick(self.ring.done_bytes)
            else:
                self.ring.run(self._tickets(), lambda: Worker(self), on_tick)
            self.files.check_unchanged()
        finally:
            self._close()

    def iterate(self) -> Generator[tuple[Placement, Storage], None, None]:
        """Execute the plan, yielding each placement in plan order; the sink is an `IteratorSink`. Errors as for `run`.

        Reading runs ahead of the consumer. Close the generator to end early. On an accelerator, tensors are ready for
        what is given to the current stream from then on.
        """
        with boundary(self.checkpoint.path, CheckpointError):
            yield from self._iterate()

    def _iterate(self) -> Generator[tuple[Placement, Storage], None, None]:
        sink = self.sink
        assert isinstance(sink, IteratorSink)
        ended = False
        blocks = self._blocks() if self.budget.lanes else None
        try:
            self._torch.hold()
            if blocks is not None:
                for _ in blocks:
                    yield from iter(lambda: sink.take_ready(self.ring), None)
            else:
                self.ring.start(self._tickets(), lambda: Worker(self))
                yield from iter(lambda: sink.take(self.ring), None)
                self.ring.finish()
            ended = True
            self.files.check_unchanged()
        finally:
            try:
                # who closes the iterator early does not care what reading ahead would have found
                with contextlib.nullcontext() if ended else contextlib.suppress(OctavoError):
                    if blocks is not None:
                        blocks.close()
                    self.ring.finish()
            finally:
                self._close()

    def _close(self) -> None:
        try:
            self.ring.finish()  # once more, should Ctrl-C have come just before it was called
        finally:
            self.files.close()
            self._torch.release()

    # -- on accelerators: threads read blocks, this thread launches ---------------------------------------------------

    def _blocks(self) -> Generator[None, None, None]:
        """Run the plan, a step a slot that has been read; what is placed by then is ready for the current stream."""
        budget, for_iterator = self.budget, isinstance(self.sink, IteratorSink)
        pinned = budget.device.type in ("cuda", "xpu")
        presses: dict[str, DevicePress] = {}
        try:
            with enough_memory(budget.device, "staging; a smaller staging_bytes needs less"):
                slots = [Slot(budget.slot_bytes, pinned) for _ in range(budget.slots)]
            for name in dict.fromkeys(placement.device for placement in self.plan.placements):
                device = torch.device(name)
                with enough_memory(device, "staging; a smaller staging_bytes needs less"):
                    presses[name] = DevicePress(self.checkpoint, replace(budget, device=device), self._placed)
            blocks = self._count_again(cut_in_turn(self.plan.placements, self.checkpoint.tensors, budget.block_bytes))
            reads = cut_reads(blocks, budget.read_bytes)
            with contextlib.closing(self.ring.relay(reads, slots, self._read_part)) as arriving:
                for read, slot in arriving:
                    started, press = now(), presses[read.block.device]
                    if for_iterator and not read.start:
                        press.follow()
                    placed = press.take(read, slot)
                    if for_iterator and read.last:
                        press.check()
                        press.precede()
                    self.count_placed(started, placed)
                    yield
            self.files.check_unchanged()
            for press in presses.values():
                press.check()
        finally:
            with contextlib.ExitStack() as stack:
                for press in presses.values():
                    stack.callback(press.close)

    def _count_again(self, blocks: Iterator[Block]) -> Iterator[Block]:
        for block in blocks:
            if block.in_order:
                self._again_bytes += sum(c.nbytes for b in block.bundles if b.work is Work.AMAX for c in b.chunks)
            yield block

    def _read_part(self, read: Read, slot: Slot) -> int:
        started = now()
        if len(read.runs) == 1 and slot.aligned and not read.runs[0].shared and read.runs[0].shard != NOTHING:
            slot.start = self.files.read_run(read.runs[0].shard, slot.view, read.runs[0].offset, read.nbytes)
        else:
            slot.start = at = 0
            for shard, offset, nbytes, _ in read.runs:
                if shard != NOTHING:
                    self.files.read_into(shard, slot.view[at : at + nbytes], offset)
                at += nbytes
        self._count_read(started, read.nbytes)
        return read.nbytes

    def _count_read(self, started: float, nbytes: int) -> None:
        with self._lock:
            self.tally.read_s += now() - started
            self.tally.read_bytes += nbytes

    # -- on a CPU: each thread reads and quantizes --------------------------------------------------------------------

    def _tickets(self) -> Iterator[Chunk]:
        """Chunks in plan order; a placement is opened in the sink just before its first."""
        for chunk in cut_placements(self.plan.placements, self.budget.slot_bytes):
            self._placed.open(chunk.placement)
            if chunk.work is Work.AMAX:
                self._again_bytes += chunk.nbytes
                self._placed.expect(chunk.placement, chunk.unit)
            yield chunk

    def make_press(self) -> Press:
        """Make a press for one thread."""
        return Press(self.checkpoint, self.budget, self._placed)

    def read(self, chunk: Chunk, slot: Slot) -> Tensor | Encoded:
        """Read a chunk into a slot, in file order; returns its bytes, or codes and scales."""
        started, info = now(), self.checkpoint.tensors[chunk.piece.src_name]
        found: Tensor | Encoded
        if info.coding is None or not chunk.piece.numel:
            nbytes = self.files.read_piece(info, chunk.piece, slot.view)
            found = slot.buffer[:nbytes]
        else:
            found, nbytes = read_encoded(self.files, info, chunk.piece, slot.buffer)
        self._count_read(started, nbytes)
        return found

    def count_placed(self, started: float, nbytes: int) -> None:
        """Count what a thread has placed since then."""
        with self._lock:
            self.tally.quantize_s += now() - started
            self.tally.placed_bytes += nbytes


class Worker:
    """A thread of the ring that reads and quantizes: slots, and a press of its own."""

    def __init__(self, stream: Stream) -> None:
        budget = stream.budget
        self.stream = stream
        # each worker is one thread of work; torch's own threads would fight over the cores
        torch.set_num_threads(1)
        self.slot = Slot(budget.slot_bytes, pinned=False)
        self.press = stream.make_press()

    def handle(self, chunk: Chunk) -> int:
        read, started = self.stream.read(chunk, self.slot), now()
        placed = self.press.take(chunk, read)
        self.stream.count_placed(started, placed)
        return chunk.nbytes

    def close(self) -> None:
        pass
