"""The loop: read a chunk, quantize it, place it. Executes a plan and decides nothing.

Threads of the ring read chunks into slots; a press computes scales and FP8 bytes, in the same thread on a CPU, in the
caller's on a GPU, and writes them where the sink says. Chunks of one parameter may finish in any order; their bytes
don't depend on it.

Where scale groups span chunks (a tensor-wide scale, a transposed source), the plan has each chunk read twice: first for
the amax, then, when all of the group's have been seen, to quantize.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import dtypes
from .checkpoint import Checkpoint
from .chunks import Chunk, Work, cut_plan
from .errors import WeightError
from .geometry import LANES, Geometry
from .plan import Placement, Plan
from .press import Press, describe_nonfinite
from .ring import Files, Ring, SingleThreadedTorch, Slot, now
from .sinks import Destination, Sink


@dataclass
class Tally:
    """What a stream measured: seconds summed over threads, bytes."""

    read_s: float = 0.0
    quantize_s: float = 0.0
    read_bytes: int = 0
    placed_bytes: int = 0


@dataclass
class _State:
    """Progress of one placement. Changed only inside ``Ring.update``."""

    destination: Destination
    issued: int = 0
    done: int = 0
    complete: bool = False  # its last chunk has been issued
    amax: Tensor | None = None  # float32 grid, for groups that span chunks
    unread: dict[int, int] = field(default_factory=dict)  # unit -> AMAX chunks issued and not done


class Stream:
    """One execution of a plan into a sink."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        sink: Sink,
        *,
        threads: int | None = None,
        slot_bytes: int | None = None,
        geometry: Geometry | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.checkpoint, self.plan, self.sink = checkpoint, plan, sink
        self.geometry = geometry or Geometry.fit(plan, threads, slot_bytes)
        self.ring: Ring[Chunk] = Ring(self.geometry.threads)
        self.files = Files(checkpoint.shards)
        self.tally = tally or Tally()  # several streams of one job share theirs
        self._states: dict[str, _State] = {}
        self._check_later = False
        self._unchecked: list[tuple[Placement, Tensor]] = []  # scales on an accelerator, looked at once at the end
        self._torch = SingleThreadedTorch()
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(chunk.nbytes for chunk in cut_plan(self.plan, self.geometry.slot_bytes))

    def run(self, progress: Callable[[int, int], None] | None = None) -> Tally:
        """Execute the plan; on any error, all threads have ended and all files are closed when it is raised.

        Args:
            progress: called about ten times a second, in this thread, with bytes read and bytes in all.
        """
        total = self.total_bytes if progress else 0
        self._torch.hold()
        try:
            on_tick = (lambda done: progress(done, total)) if progress else None
            if self.geometry.device.type == "cuda":
                self._relay(on_tick)
            else:
                self.ring.run(self._tickets(), self._worker, on_tick)
            self.finish()
        finally:
            self._close()
        return self.tally

    def start(self) -> None:
        """Begin in the background: for a sink whose consumer is the calling thread. `stop` must follow."""
        self._torch.hold()
        self.ring.start(self._tickets(), self._worker)

    def stop(self) -> None:
        """End the threads, close the files, raise what any thread raised."""
        try:
            self.ring.finish()
        finally:
            self._close()

    def _close(self) -> None:
        self.files.close()
        self._torch.release()

    def finish(self) -> None:
        """After the last chunk: the sources must still be what they were, and every scale finite."""
        self.files.check_unchanged()
        checked = [(placement, torch.isfinite(scale.float()).all()) for placement, scale in self._unchecked]
        if checked and not bool(torch.stack([flag for _, flag in checked]).all()):
            raise WeightError(describe_nonfinite(self.checkpoint, next(p for p, flag in checked if not flag)))

    def _worker(self) -> _Worker:
        return _Worker(self)

    def _relay(self, on_tick: Callable[[int], None] | None) -> None:
        """Threads read, this thread quantizes: see `octavo.press`."""
        geometry, self._check_later = self.geometry, True
        slots = [Slot(geometry.slot_bytes, pinned=True) for _ in range(geometry.threads * geometry.slots_per_thread)]
        press = Press(self, LANES, check_later=True)
        try:
            self.ring.relay(self._tickets(), slots, self.read, press.take, on_tick)
        finally:
            press.close()

    def _tickets(self) -> Iterator[Chunk]:
        """Chunks in plan order; a placement is opened in the sink just before its first."""
        for chunk in cut_plan(self.plan, self.geometry.slot_bytes):
            state = self._states.get(chunk.placement.name)
            if state is None:
                state = _State(self.sink.open(chunk.placement, self.ring))
                self._states[chunk.placement.name] = state
            with self._lock:
                state.issued += 1
                state.complete |= chunk.last
                if chunk.work is Work.AMAX:
                    state.unread[chunk.unit] = state.unread.get(chunk.unit, 0) + 1
            yield chunk

    def state(self, placement: Placement) -> _State:
        return self._states[placement.name]

    def add_amax(self, chunk: Chunk, grid: Tensor) -> None:
        """Fold a chunk's amax into those of its groups."""
        state = self.state(chunk.placement)
        with self._lock:
            if state.amax is None:
                state.amax = torch.zeros(chunk.placement.scale_grid, dtype=torch.float32, device=grid.device)
            region = state.amax[chunk.cells]
            region.copy_(torch.maximum(region, grid))
            state.unread[chunk.unit] -= 1
        self.ring.update(lambda: None)

    def wait_amax(self, chunk: Chunk) -> Tensor:
        """The amax of a chunk's groups, once every chunk of its unit has been folded in."""
        state = self.state(chunk.placement)
        self.ring.wait_for(lambda: not state.unread.get(chunk.unit))
        assert state.amax is not None
        return state.amax[chunk.cells]

    def read(self, chunk: Chunk, slot: Slot) -> int:
        """Read a chunk into a slot, in file order; returns its bytes."""
        started = now()
        piece, info = chunk.piece, self.checkpoint.tensors[chunk.piece.src_name]
        bits, at = dtypes.moved_bits(info.dtype_name), 0
        if piece.numel:
            length, offsets = piece.runs()
            run_bytes = length * bits // 8
            for offset in offsets:
                self.files.read_into(info.shard, slot.view[at : at + run_bytes], info.offset + offset * bits // 8)
                at += run_bytes
        with self._lock:
            self.tally.read_s += now() - started
        return at

    def done(self, chunk: Chunk, quantize_s: float, placed: int) -> None:
        """Count a chunk; close its placement with the last one."""
        state = self.state(chunk.placement)
        with self._lock:
            state.done += 1
            self.tally.quantize_s += quantize_s
            self.tally.read_bytes += chunk.nbytes
            self.tally.placed_bytes += placed
            finished = state.complete and state.done == state.issued
            if finished:
                self.tally.placed_bytes += chunk.placement.scale_bytes
        if finished:
            state.amax = None
            state.destination.close()
            if self._check_later and state.destination.scale is not None:
                self._unchecked.append((chunk.placement, state.destination.scale))
            del state.destination  # whoever took the parameter may drop it


class _Worker:
    """A thread of the ring that reads and quantizes: slots, and a press of its own."""

    def __init__(self, stream: Stream) -> None:
        geometry = stream.geometry
        self.stream = stream
        # each worker is one thread of work; torch's own threads would fight over the cores
        torch.set_num_threads(1)
        pinned = geometry.device.type == "cuda"
        self.slots = [Slot(geometry.slot_bytes, pinned) for _ in range(geometry.slots_per_thread)]
        self.press = Press(stream)
        self.turn = 0

    def handle(self, chunk: Chunk) -> int:
        slot = self.slots[self.turn]
        self.turn = (self.turn + 1) % len(self.slots)
        slot.wait()
        self.press.take(chunk, slot, self.stream.read(chunk, slot))
        return chunk.nbytes

    def close(self) -> None:
        self.press.close()
