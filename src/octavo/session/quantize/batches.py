"""Quantizing on an accelerator: values wait in its memory, and many are quantized at once.

There, what costs is launching, some 10 µs an operation: tensor by tensor, a model of thousands takes seconds for what
is a tenth of one of arithmetic. So values that come are copied, and nothing else: one by one, or many at once if they
stay as they are (`Batches.gather`). Their owner may change them once `Batches.settle` has returned. When a batch is
full, boxes that lie regularly in it and in their parameter are joined (`octavo.planning.blocks`), and the scales of
all are
computed together.

Values in pageable memory go through pinned memory, which is sent a few MiB at a time. What comes from the host is
copied on a stream of its own, while the batch before is quantized.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint import dtypes
from ...elements.operations import offset_of
from ...elements.pieces import Piece, packed_strides
from ...numerics import schemes
from ...numerics.schemes import Scheme, Stored
from ...planning.bundles import Bundle, join
from ...planning.chunks import Work
from ...streaming.nonfinite import FiniteWatch
from ...streaming.on_accelerator import scales_of
from ...streaming.staged import Staged, backend_of
from .storage import QuantizedStorage

#: values begin at multiples of it: any dtype can be viewed, and tensors of one shape lie evenly
_ALIGNED_BYTES = 16
#: pinned memory is sent when so much of it is filled
_SEND_BYTES = 8 << 20
#: a batch's share of the budget: there are two, and scales need room
_SHARE = 3


class _Job(NamedTuple):
    """A box whose values wait. ``piece`` counts offsets and strides within the batch, in elements of ``dtype``."""

    storage: QuantizedStorage
    piece: Piece
    dtype: torch.dtype
    grid: Tensor | None  # where its scales go, if they have no place in the storage yet
    what: object

    @property
    def scales(self) -> Tensor:
        return self.storage.scale_place(self.piece.box) if self.grid is None else self.grid


class _Lane:
    """The memory of a batch, on the device and, once it is needed, pinned on the host."""

    def __init__(self, nbytes: int, device: torch.device, backend: Any) -> None:
        self.staged = Staged(nbytes, device)
        self.pinned: Tensor | None = None
        self.copying = False  # some of the batch comes on the stream of copies
        self.sending = False  # pinned memory may still be read by the copies of the batch before
        if backend is not None:
            self.copied, self.free = backend.Event(), backend.Event()
            self.free.record(backend.current_stream(device))


class _Copies:
    """Copies that are to be made, all at once: from one memory to another of a device that is one launch or two."""

    def __init__(self) -> None:
        self._places: list[Tensor] = []
        self._values: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def add(self, place: Tensor, values: Tensor) -> None:
        self._places.append(place)
        self._values.append(values)

    def run(self, *, non_blocking: bool = False) -> None:
        places, values, self._places, self._values = self._places, self._values, [], []
        torch._foreach_copy_(places, values, non_blocking=non_blocking)


class Batches:
    """Takes values of boxes that hold whole scale groups, for weights on one device."""

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self.limit_bytes = staging_bytes // _SHARE // _ALIGNED_BYTES * _ALIGNED_BYTES  # the most that `put` takes
        self._device = device
        self._backend = backend_of(device)
        self._copies: Any = None if self._backend is None else self._backend.Stream(device)
        self._first: Any = None if self._backend is None else self._backend.current_stream(device)
        self._last: Any = self._first
        self._lanes = [_Lane(self.limit_bytes, device, self._backend) for _ in range(2)]
        schemes.warm_up(device)
        self._jobs: list[_Job] = []
        self._used = self._sent = 0  # bytes of the batch that hold values; those of them that have left the host
        self._near, self._far = _Copies(), _Copies()  # on the caller's stream, and from pinned memory
        self._unsettled = False
        #: what was put and is in no storage, since an error came between
        self.lost: list[object] = []
        self._watch: FiniteWatch[list[_Job]] = FiniteWatch(device)

    def put(self, storage: QuantizedStorage, piece: Piece, values: Tensor, dtype: torch.dtype, what: object) -> None:
        """Take ``values``, of the piece's size and strides, to quantize them in ``dtype`` later."""
        nbytes = piece.numel * dtype.itemsize
        if self._used + nbytes > self.limit_bytes:
            self.press()
        begin, strides = self._used, packed_strides(piece.size, piece.src_strides)  # memory is copied as it lies
        packed = Piece(piece.dst_off, piece.size, "", begin // dtype.itemsize, strides)
        end = min(self.limit_bytes, -(-(begin + nbytes) // _ALIGNED_BYTES) * _ALIGNED_BYTES)
        near = self._backend is None or values.device.type != "cpu"
        if near or (values.dtype == dtype and values.stride() == strides and values.is_pinned()):
            self._send()
            (self._near if near else self._far).add(self._lanes[0].staged.view(dtype, packed), values)
            self._sent = end
        else:
            pinned = self._pinned().view(dtype)
            pinned.as_strided(packed.size, packed.src_strides, packed.src_off).copy_(values)
        self._used = end
        if end - self._sent >= _SEND_BYTES:
            self._send()
        grid = storage.scale_place(piece.box) if storage.scale is None else None
        self._jobs.append(_Job(storage, packed, dtype, grid, what))

    def gather(self) -> None:
        """Copy what was put; nobody holds it here any more."""
        try:
            if self._near:
                self._follow()
                self._near.run()  # on the caller's stream, as is whatever the values' owner does before and after
            if self._far:
                self._unsettled = True
                with self._copying():
                    self._far.run(non_blocking=True)
        except BaseException:
            self._lose()
            raise

    def settle(self) -> None:
        """Wait until no value that was put is needed any more."""
        self.gather()
        if self._unsettled:
            self._copies.synchronize()
            self._unsettled = False

    def press(self) -> None:
        """Quantize what waits."""
        if not self._jobs:
            return
        try:
            self._press()
        except BaseException:
            self._lose()
            raise

    def _press(self) -> None:
        self._follow()
        self._send()
        self.gather()
        lane, jobs = self._lanes[0], self._jobs
        if lane.copying:
            lane.copied.record(self._copies)
            self._backend.current_stream(self._device).wait_event(lane.copied)
        lane.copying, lane.sending = False, lane.pinned is not None
        for scheme, tasks in self._tasks(jobs, lane).items():
            self._watch.add(_quantize(tasks, scheme), jobs)
        if self._backend is not None:
            lane.free.record(self._backend.current_stream(self._device))
        self._jobs, self._used, self._sent = [], 0, 0
        self._lanes.reverse()

    def _tasks(self, jobs: list[_Job], lane: _Lane) -> dict[Scheme, list[_Task]]:
        """Boxes by scheme; those that lie regularly are joined, unless their scales have no place yet."""
        storages = {job.storage.name: job.storage for job in jobs}
        found: dict[Scheme, list[_Task]] = {}
        for bundle in join(_bundle(job) for job in jobs if job.grid is None):
            storage = storages[bundle.placement.name]
            values = lane.staged.view(dtypes.MOVED[bundle.dtype_name], bundle.piece)
            out = _numbers(storage, bundle.piece)
            off, size = [cut.start for cut in bundle.cells], [cut.stop - cut.start for cut in bundle.cells]
            found.setdefault(storage.scheme, []).append(_Task(values, out, _region(storage.grid, off, size)))
        for job in jobs:
            if job.grid is not None:
                task = _Task(lane.staged.view(job.dtype, job.piece), _numbers(job.storage, job.piece), job.grid)
                found.setdefault(job.storage.scheme, []).append(task)
        return found

    def _lose(self) -> None:
        """Drop what waits: nobody knows what of it the batch holds."""
        self.lost += [job.what for job in self._jobs]
        self._jobs, self._used, self._sent = [], 0, 0
        self._near, self._far = _Copies(), _Copies()

    def watch(self, worst: Tensor, storage: QuantizedStorage, piece: Piece, what: object) -> None:
        """Let `suspect` know of a box that was quantized elsewhere, by its largest magnitude."""
        self._follow()
        self._watch.add(worst, [_Job(storage, piece, storage.weight.dtype, None, what)])

    def suspect(self) -> object | None:
        """Wait; the first value since this was asked before that was not finite, or None."""
        self.press()
        # what is not finite has scales that are not, unless other values have taken its place
        suspects = (job for jobs in self._watch.suspects() for job in jobs)
        return next((job.what for job in suspects if not torch.isfinite(job.scales.float()).all()), None)

    def close(self) -> None:
        """Whatever waits is dropped; nothing is copied any more, so that the memory may go."""
        if self._copies is not None:
            self._copies.synchronize()
            if self._last != self._first:  # the allocator knows only of the stream on which it gave the memory
                self._last.synchronize()

    def _follow(self) -> None:
        """The caller may have gone to another stream: what it does there comes after what was done here before."""
        if self._backend is not None:
            current = self._backend.current_stream(self._device)
            if current != self._last:
                current.wait_stream(self._last)
                self._last = current

    def _pinned(self) -> Tensor:
        lane = self._lanes[0]
        if lane.pinned is None:
            lane.pinned = torch.empty(self.limit_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        if lane.sending:
            lane.copied.synchronize()
            lane.sending = False
        return lane.pinned

    def _send(self) -> None:
        """Send what waits in pinned memory."""
        lane, filled = self._lanes[0], slice(self._sent, self._used)
        if filled.start < filled.stop:
            assert lane.pinned is not None
            with self._copying():
                lane.staged.bytes[filled].copy_(lane.pinned[filled], non_blocking=True)
            self._sent = self._used

    def _copying(self) -> Any:
        """On the stream of copies, once the batch's memory is free."""
        lane = self._lanes[0]
        if not lane.copying:
            self._copies.wait_event(lane.free)
            lane.copying = True
        return self._backend.stream(self._copies)


class _Task(NamedTuple):
    """Values in a batch, and where their FP8 numbers and scales go."""

    values: Tensor
    out: Stored
    scales: Tensor


def _quantize(tasks: Sequence[_Task], scheme: Scheme) -> Tensor:
    """Quantize all of them, their scales computed together. Returns the amax of all groups."""
    values = [task.values for task in tasks]
    scales = scales_of(values, [task.scales.shape for task in tasks], [(0, 0)] * len(tasks), scheme)
    for task, scale in zip(tasks, scales.grids, strict=True):
        schemes.quantize_into(task.out, task.values, scale, scheme)
    for task, stored in zip(tasks, scales.stored, strict=True):
        task.scales.copy_(stored)
    return scales.amax


def _bundle(job: _Job) -> Bundle:
    cells = job.storage.cells(job.piece.box)
    return Bundle(job.storage.placement, Work.QUANTIZE, dtypes.NAMES[job.dtype], job.piece, cells, (0, 0), ())


def _numbers(storage: QuantizedStorage, piece: Piece) -> Stored:
    numbers = storage.numbers
    if isinstance(numbers, Tensor):
        return _region(numbers, piece.dst_off, piece.size)
    return schemes.region(numbers, piece.box)


def _region(whole: Tensor, off: Sequence[int], size: Sequence[int]) -> Tensor:
    """``whole[off : off + size]`` in one operation, not one an axis."""
    strides = whole.stride()
    return whole.as_strided(size, strides, offset_of(whole) + sum(map(operator.mul, off, strides)))
