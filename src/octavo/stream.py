"""The loop: read a chunk, quantize it, place it. Executes a plan and decides nothing.

Each worker thread of the ring reads a chunk into its slot, computes scales and FP8 bytes with its own scratch memory,
and writes them where the sink says. Chunks of one parameter may finish in any order; their bytes don't depend on it.

Where scale groups span chunks (a tensor-wide scale, a transposed source), the plan has each chunk read twice: first for
the amax, then, when all of the group's have been seen, to quantize.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor

from . import dtypes, schemes
from .checkpoint import Checkpoint
from .chunks import Chunk, Work, cut_plan, cut_tiles, default_slot_bytes
from .errors import DeviceError, WeightError
from .pieces import Piece
from .plan import Placement, Plan
from .ring import Files, Ring, Slot, now
from .schemes import Scheme
from .sinks import Destination, Sink

MIN_STAGING_BYTES = 1 << 20
#: elements of a tile on a CPU: what stays in a core's cache
_SCRATCH_ELEMENTS = 1 << 19
#: slots on an accelerator: two for each thread, large enough to hide the cost of launching a copy
_PINNED_SLOT_BYTES = 8 << 20
_MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the staging budget is divided: threads, slots and scratch."""

    threads: int
    slots_per_thread: int
    slot_bytes: int
    scratch_elements: int
    device: torch.device

    @property
    def worker_bytes(self) -> int:
        """Staging of one thread on the host or the device, whichever is more: see `_Worker`."""
        # a slot holds at least two bytes for each FP8 byte that comes of it
        if self.device.type == "cpu":
            return self.slot_bytes + self.slot_bytes // 2 + self.scratch_elements * 8
        # on the host, pinned slots; on the device, one copy of a slot, and what a kernel may need beside it
        return 2 * self.slot_bytes

    @property
    def staging_bytes(self) -> int:
        return self.threads * self.worker_bytes

    @classmethod
    def fit(cls, plan: Plan, threads: int | None = None, slot_bytes: int | None = None) -> Geometry:
        """The largest geometry within ``plan.staging_bytes``: fewer threads first, then smaller slots.

        Raises:
            DeviceError: the budget is too small for a single thread.
        """
        device = next((torch.device(d) for d in plan.devices if d != "cpu"), torch.device("cpu"))
        if plan.staging_bytes < MIN_STAGING_BYTES:
            raise DeviceError(
                f"staging_bytes is {plan.staging_bytes:,}; at least {MIN_STAGING_BYTES:,} (1 MiB) are needed"
            )
        if threads is not None and threads < 1:
            raise DeviceError(f"threads is {threads}; at least 1 is needed")
        wanted = threads or min(_usable_cpus(), _MAX_THREADS)
        size = slot_bytes or (default_slot_bytes(plan) if device.type == "cpu" else _PINNED_SLOT_BYTES)
        while True:
            scratch = min(size // 2, _SCRATCH_ELEMENTS) if device.type == "cpu" else 0
            geometry = cls(wanted, 1 if device.type == "cpu" else 2, size, scratch, device)
            if geometry.staging_bytes <= plan.staging_bytes:
                return geometry
            if wanted > 1 and (threads is None or size <= 1 << 16):
                wanted -= 1
            else:
                size //= 2


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


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
        try:
            self.ring.run(self._tickets(), self._worker, (lambda done: progress(done, total)) if progress else None)
            self.finish()
        finally:
            self.files.close()
        return self.tally

    def start(self) -> None:
        """Begin in the background: for a sink whose consumer is the calling thread. `stop` must follow."""
        self.ring.start(self._tickets(), self._worker)

    def stop(self) -> None:
        """End the threads, close the files, raise what any thread raised."""
        try:
            self.ring.finish()
        finally:
            self.files.close()

    def finish(self) -> None:
        """After the last chunk: the sources must still be what they were, and every scale finite."""
        self.files.check_unchanged()
        if self.geometry.device.type == "cpu":
            return
        checked = [
            (placement, torch.isfinite(scale.float()).all())
            for placement in self.plan.quantized
            if (scale := self.state(placement).destination.scale) is not None
        ]
        if checked and not bool(torch.stack([flag for _, flag in checked]).all()):
            raise WeightError(_describe_nonfinite(self.checkpoint, next(p for p, flag in checked if not flag)))

    def _worker(self) -> _Worker:
        return _Worker(self)

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

    def done(self, chunk: Chunk, read_s: float, quantize_s: float, placed: int) -> None:
        """Count a chunk; close its placement with the last one."""
        state = self.state(chunk.placement)
        with self._lock:
            state.done += 1
            self.tally.read_s += read_s
            self.tally.quantize_s += quantize_s
            self.tally.read_bytes += chunk.nbytes
            self.tally.placed_bytes += placed
            finished = state.complete and state.done == state.issued
            if finished:
                state.amax = None
        if finished:
            state.destination.close()


class _Worker:
    """A thread's slots and scratch, and what it does with a chunk."""

    def __init__(self, stream: Stream) -> None:
        geometry = stream.geometry
        self.stream, self.device = stream, geometry.device
        # each worker is one thread of work; torch's own threads would fight over the cores
        self._intra_op_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        on_cpu = self.device.type == "cpu"
        self.slots = [Slot(geometry.slot_bytes, pinned=not on_cpu) for _ in range(geometry.slots_per_thread)]
        self.turn = 0
        self.wide = torch.empty(geometry.scratch_elements, dtype=torch.float32)
        self.bits = torch.empty(geometry.scratch_elements, dtype=torch.float32)
        self.tile_elements = geometry.scratch_elements or geometry.slot_bytes
        self.out = torch.empty(geometry.slot_bytes // 2, dtype=torch.uint8, device=self.device)
        self.queue = None
        if not on_cpu:
            self.staged = torch.empty(geometry.slot_bytes, dtype=torch.uint8, device=self.device)
            if self.device.type == "cuda":
                self.queue = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
                self.queue.wait_stream(torch.cuda.default_stream(self.device))

    def close(self) -> None:
        if self.queue is not None:
            self.queue.synchronize()
        for slot in self.slots:
            slot.wait()

    def handle(self, chunk: Chunk) -> int:
        if self.queue is None:
            return self._handle(chunk)
        with torch.cuda.stream(self.queue):
            return self._handle(chunk)

    def _handle(self, chunk: Chunk) -> int:
        started = now()
        x = self._read(chunk)
        read = now()
        placed = 0
        with torch.no_grad():
            if chunk.work is Work.COPY:
                self.stream.state(chunk.placement).destination.put(chunk.piece, x)
                placed = chunk.nbytes
            else:
                placed = self._quantize(chunk, x)
        if self.queue is not None and chunk.work is Work.AMAX:
            self.queue.synchronize()
        self.stream.done(chunk, read - started, now() - read, placed)
        return chunk.nbytes

    def _read(self, chunk: Chunk) -> Tensor:
        """The chunk's elements as a tensor of the piece's size, in the slot (or on the device)."""
        piece, info = chunk.piece, self.stream.checkpoint.tensors[chunk.piece.src_name]
        slot = self.slots[self.turn]
        self.turn = (self.turn + 1) % len(self.slots)
        slot.wait()
        length, offsets = piece.runs()
        itemsize = info.nbytes / info.numel if info.numel else 1
        run_bytes, at = int(length * itemsize), 0
        if piece.numel:
            for offset in offsets:
                view = slot.view[at : at + run_bytes]
                self.stream.files.read_into(info.shard, view, info.offset + int(offset * itemsize))
                at += run_bytes
        flat = slot.buffer[:at]
        if self.device.type != "cpu":
            flat = self.staged[:at].copy_(flat, non_blocking=True)
            if self.queue is not None:
                slot.busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
                slot.busy.record(self.queue)
        if dtypes.TORCH[info.dtype_name] is None:
            return flat  # carried as bytes
        order = piece.file_order()
        in_file = flat.view(info.dtype).view([piece.size[d] for d in order])
        return in_file.permute([order.index(d) for d in range(len(order))])

    def _quantize(self, chunk: Chunk, x: Tensor) -> int:
        placement, piece = chunk.placement, chunk.piece
        assert placement.scheme is not None
        scheme = schemes.get(placement.scheme)
        destination = self.stream.state(placement).destination
        if chunk.work is Work.REREAD:
            amax = self.stream.wait_amax(chunk)
        else:
            amax = self._amax(x, chunk, scheme)
            if x.device.type == "cpu" or destination.scale is None:
                self._check_finite(amax, chunk, x)  # elsewhere that would wait for the device: see Stream.finish
        if chunk.work is Work.AMAX:
            self.stream.add_amax(chunk, amax)
            return 0
        scale = schemes.scale_from_amax(amax, scheme)
        destination.put_scale(chunk.cells, schemes.to_stored(scale, scheme))
        view = destination.view(piece)
        out = self.out[: piece.numel].view(schemes.FP8).view(piece.size) if view is None else view
        for tile in cut_tiles(piece.size, scheme, chunk.phase, self.tile_elements):
            schemes.quantize_into(
                tile.region(out), tile.region(x), scale[tile.cells], scheme, phase=tile.phase, scratch=self.wide
            )
        if view is None:
            destination.put(piece, out)
        return piece.numel + scale.numel() * scheme.scale_dtype.itemsize

    def _amax(self, x: Tensor, chunk: Chunk, scheme: Scheme) -> Tensor:
        scratch = self.bits.view(x.dtype)
        grid = [cells.stop - cells.start for cells in chunk.cells]
        tiles = cut_tiles(chunk.piece.size, scheme, chunk.phase, self.tile_elements)
        if len(tiles) == 1:
            return schemes.group_amax(x, scheme, phase=chunk.phase, scratch=scratch)
        amax = torch.zeros(grid, dtype=torch.float32, device=x.device)
        for tile in tiles:
            region = amax[tile.cells]
            part = schemes.group_amax(tile.region(x), scheme, phase=tile.phase, scratch=scratch)
            region.copy_(torch.maximum(region, part))
        return amax

    def _check_finite(self, amax: Tensor, chunk: Chunk, x: Tensor) -> None:
        if bool(torch.isfinite(amax).all()):
            return
        raise WeightError(_nonfinite(self.stream.checkpoint, chunk.piece, x, chunk.placement))


def _nonfinite(checkpoint: Checkpoint, piece: Piece, values: Tensor, placement: Placement) -> str:
    """The first non-finite number among the values of a piece, and what to do about it."""
    position = torch.nonzero(~torch.isfinite(values))[0].tolist()
    where = [off + at for off, at in zip(piece.dst_off, position, strict=True)]
    shard = checkpoint.shard_of(piece.src_name).path.name
    return (
        f"{shard}: tensor {piece.src_name!r} holds {values[tuple(position)].item()} (at {where} of {placement.name}): "
        f"a non-finite weight has no FP8 form. Repair the checkpoint, or keep this tensor with "
        f"ignore=[{placement.name!r}]."
    )


def _describe_nonfinite(checkpoint: Checkpoint, placement: Placement) -> str:
    """`_nonfinite` for a placement of which only the scales have been seen."""
    for piece in placement.pieces:
        with safe_open(checkpoint.shard_of(piece.src_name).path, "pt") as file:
            source = file.get_tensor(piece.src_name)
        values = source.reshape(-1).as_strided(piece.size, piece.src_strides, piece.src_off)
        if not bool(torch.isfinite(values).all()):
            return _nonfinite(checkpoint, piece, values, placement)
    raise AssertionError(f"{placement.name}: scales are not finite, but weights are")
