"""Sinks receive a stream's bytes: the parameters of a model, shards on disk, or an iterator.

A sink opens a `Destination` for each placement, in plan order; chunks of it may then arrive in any order and from any
thread, each box once. Scales may be written more than once, with the same values.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.digests import ShardDigests
from ..elements.pieces import Piece, contiguous_strides
from ..errors import DeviceError
from ..numerics import schemes
from ..numerics.nvfp4 import Packed
from ..numerics.schemes import Stored
from ..planning.placement import Placement
from .outfile import OutFile
from .ring import Cancelled, Ring

#: torch's CUDA allocator: what blocks are rounded to, and up to which size they are in a pool of their own
_ROUND_BYTES, _SMALL_BYTES = 512, 1 << 20


class Destination(Protocol):
    """Receives one placement."""

    scale: Tensor | None  # the scales as a grid, once written; None where they are not kept in memory

    def view(self, piece: Piece) -> Stored | None:
        """The memory into which the box is to be quantized; None: use scratch, and call `put`."""

    def written(self, piece: Piece) -> None:
        """The box has been quantized into the memory that `view` gave; called by `quantize_to` alone."""

    def put(self, piece: Piece, values: Stored) -> None:
        """Take the values of a box (copied before this returns, and perhaps changed); not where `view` gave memory."""

    def put_scale(self, cells: tuple[slice, ...], values: Tensor) -> None:
        """Take the scales of some groups, in the scheme's stored dtype."""

    def view_scale(self, cells: tuple[slice, ...]) -> Tensor | None:
        """The memory of the scales of some groups, as stored; None: call `put_scale`. Not for `nvfp4`."""

    def close(self) -> None:
        """The placement is complete."""


class Sink(Protocol):
    """Opens destinations."""

    def open(self, placement: Placement, ring: Ring[Any]) -> Destination:
        """Called in plan order, by one thread at a time; may block in ``ring.wait_for``."""


def quantize_to(
    destination: Destination,
    piece: Piece,
    view: Stored | None,
    scratch: Callable[[], Stored],
    quantize: Callable[[Stored], None],
) -> None:
    """Have a box quantized where it stays, or in scratch memory where there is no view of that; and tell so."""
    if view is not None:
        quantize(view)
        destination.written(piece)
    else:
        out = scratch()
        quantize(out)
        destination.put(piece, out)


# -- parameters -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Storage:
    """A parameter's memory, in the stored layout, and that of its scale."""

    weight: Tensor
    scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.scale

    @classmethod
    def allocate(cls, placement: Placement) -> Storage:
        """Uninitialised memory of the right shapes, dtypes and device."""
        weight = torch.empty(placement.memory_shape, dtype=placement.dtype, device=placement.device)
        if placement.scheme is None:
            return cls(weight)
        dtype = placement.rule.scale_dtype
        return cls(weight, torch.empty(placement.scale_shape, dtype=dtype, device=placement.device))


@dataclass(slots=True)
class PackedStorage:
    """A parameter's memory where numbers, their scales and what is over all lie apart, as engines have them."""

    numbers: Packed
    divisor: Tensor  # one by the scale over all

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.numbers, self.divisor)


@dataclass(slots=True)
class WordStorage:
    """A parameter's memory where several numbers are one integer, in which their bytes are what ``to_bytes`` makes."""

    words: Tensor
    scale: Tensor
    to_bytes: Callable[[Tensor], Tensor]  # in place

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.words, self.scale


#: of a parameter
Memory = Storage | PackedStorage | WordStorage


@contextlib.contextmanager
def enough_memory(device: torch.device, what: str) -> Iterator[None]:
    """Turn running out of a device's memory into a `DeviceError` that says for what."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} has not enough memory for {what}: {str(error).splitlines()[0]}") from error


def allocate_all(placements: Sequence[Placement]) -> dict[str, Storage]:
    """`Storage.allocate` for each, by name; on a GPU, out of one reserved piece of memory."""
    storages = {}
    for name in dict.fromkeys(placement.device for placement in placements):
        device, mine = torch.device(name), [p for p in placements if p.device == name]
        needed_bytes = sum(placement.final_bytes for placement in mine)
        with enough_memory(device, f"the model, {needed_bytes:,} bytes; plan --device-memory auto says what fits"):
            _reserve(mine, device)
            storages.update({placement.name: Storage.allocate(placement) for placement in mine})
    return storages


def _reserve(placements: Sequence[Placement], device: torch.device) -> None:
    """Let torch's allocator hold one block that all of them fit into.

    It asks the driver for multiples of 2 MiB, and does not give what is left of one to another tensor if it is less
    than 1 MiB: of hundreds of parameters, that is 100 MiB. Out of a large block it cuts to 512 bytes.
    """
    settings = ",".join(os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    if device.type != "cuda" or "max_split_size_mb" in settings:  # which forbids cutting large blocks
        return
    sizes = itertools.chain.from_iterable((p.nbytes, p.scale_bytes) for p in placements)
    nbytes = sum(-(-size // _ROUND_BYTES) * _ROUND_BYTES for size in sizes if size > _SMALL_BYTES)
    with contextlib.suppress(torch.OutOfMemoryError):  # not in one piece, then; allocating them tells if not at all
        torch.empty(nbytes, dtype=torch.uint8, device=device)


class _Parameter:
    def __init__(self, placement: Placement, storage: Storage) -> None:
        self._weight: Stored = storage.weight
        if placement.scheme is not None:
            self._weight = placement.rule.numbers_in(storage.weight)
        self.scale: Tensor | None = None
        if storage.scale is not None:
            self.scale = storage.scale.view(placement.scale_grid)

    def view(self, piece: Piece) -> Stored:
        return schemes.region(self._weight, piece.box)

    def written(self, piece: Piece) -> None:
        pass

    def put(self, piece: Piece, values: Stored) -> None:
        schemes.copy_into(self.view(piece), values, non_blocking=True)

    def put_scale(self, cells: tuple[slice, ...], values: Tensor) -> None:
        assert self.scale is not None
        self.scale[cells].copy_(values, non_blocking=True)

    def view_scale(self, cells: tuple[slice, ...]) -> Tensor | None:
        return None if self.scale is None else self.scale[cells]

    def close(self) -> None:
        pass


class _Apart(_Parameter):
    def __init__(self, placement: Placement, storage: PackedStorage) -> None:
        self._weight, self.scale = storage.numbers, storage.divisor.view(placement.scale_grid)

    def put_scale(self, cells: tuple[slice, ...], values: Tensor) -> None:
        super().put_scale(cells, 1 / values)  # exact


class _Words(_Parameter):
    def __init__(self, placement: Placement, storage: WordStorage) -> None:
        super().__init__(placement, Storage(storage.words.view(placement.dtype), storage.scale))
        self._to_bytes = storage.to_bytes

    def written(self, piece: Piece) -> None:
        numbers = self.view(piece)
        assert isinstance(numbers, Tensor)
        self._to_bytes(numbers)

    def put(self, piece: Piece, values: Stored) -> None:
        assert isinstance(values, Tensor)
        super().put(piece, self._to_bytes(values))


class ParameterSink:
    """Writes into memory that exists: ``storages`` maps parameter names to it."""

    def __init__(self, storages: Mapping[str, Memory]) -> None:
        self._storages = storages

    def open(self, placement: Placement, ring: Ring[Any]) -> Destination:
        storage = self._storages[placement.name]
        if isinstance(storage, PackedStorage):
            return _Apart(placement, storage)
        if isinstance(storage, WordStorage):
            return _Words(placement, storage)
        return _Parameter(placement, storage)


# -- an iterator ------------------------------------------------------------------------------------------------------


class IteratorSink:
    """Hands finished placements, in plan order, to the consumer of `Stream.iterate`.

    Memory runs ahead of the consumer by at most ``ahead_bytes`` (or one placement, if that is larger); by a block at
    most (None) where the consumer's own thread does the work.
    """

    def __init__(self, ahead_bytes: int | None) -> None:
        self._ahead_bytes = ahead_bytes  # includes the tensor that the consumer holds
        self._outstanding = 0
        self._held = 0  # bytes of the one that the consumer has
        self._order: deque[_Pending] = deque()

    def open(self, placement: Placement, ring: Ring[Any]) -> Destination:
        size = placement.final_bytes
        ahead = self._ahead_bytes
        if ahead is not None:
            ring.wait_for(lambda: not self._outstanding or self._outstanding + size <= ahead)
        pending = _Pending(placement, Storage.allocate(placement), ring)

        def add() -> None:
            self._outstanding += size
            self._order.append(pending)

        ring.update(add)
        return pending

    def take(self, ring: Ring[Any]) -> tuple[Placement, Storage] | None:
        """The next placement; None when there are no more. Blocks until it is complete."""

        def release() -> None:
            self._outstanding -= self._held
            self._held = 0

        def ready() -> bool:
            return bool(self._order and self._order[0].complete) or not ring.running

        ring.update(release)
        try:
            ring.wait_for(ready)
        except Cancelled:
            return None  # `Ring.finish` raises the error that stopped it
        return self.take_ready(ring)

    def take_ready(self, ring: Ring[Any]) -> tuple[Placement, Storage] | None:
        """The next placement if it is complete."""
        if not self._order or not self._order[0].complete:
            return None
        pending = self._order[0]

        def remove() -> None:
            self._order.popleft()
            self._held = pending.placement.final_bytes

        ring.update(remove)
        return pending.placement, pending.storage


class _Pending(_Parameter):
    def __init__(self, placement: Placement, storage: Storage, ring: Ring[Any]) -> None:
        super().__init__(placement, storage)
        self.placement, self.storage, self._ring = placement, storage, ring
        self.complete = False

    def close(self) -> None:
        def finish() -> None:
            self.complete = True

        self._ring.update(finish)


# -- a shard on disk --------------------------------------------------------------------------------------------------


class ShardSink:
    """Writes boxes to their places in one file whose layout is known.

    ``extents`` maps a placement's name to where its weight begins, ``scale_extents`` to where its scale does, and
    ``group_extents`` to where scales are that belong to its numbers; ``cast_scale`` turns stored scales into those of
    the format, and ``to_bytes`` a scheme's numbers, in place; ``digests`` are made of what is written.
    """

    def __init__(
        self,
        file: OutFile,
        extents: Mapping[str, int],
        scale_extents: Mapping[str, int],
        cast_scale: Callable[[Placement, Tensor], Tensor],
        to_bytes: Callable[[str | None, Tensor], Tensor],
        digests: ShardDigests | None = None,
        group_extents: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._file, self._digests, self._to_bytes = file, digests, to_bytes
        self._extents, self._scale_extents, self._cast_scale = extents, scale_extents, cast_scale
        self._group_extents = group_extents

    def open(self, placement: Placement, ring: Ring[Any]) -> Destination:
        return _FileRegion(self, placement)

    def write_box(self, base: int, shape: tuple[int, ...], box: tuple[slice, ...], values: Tensor, bits: int) -> None:
        """Write ``values`` to ``box`` of a row-major tensor of ``shape`` that begins at ``base``."""
        if not values.numel():
            return
        data = values.detach().to("cpu").contiguous()
        flat = memoryview(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        strides = contiguous_strides(shape)
        origin = sum(s.start * n for s, n in zip(box, strides, strict=True))
        region = Piece((0,) * len(shape), tuple(s.stop - s.start for s in box), "", origin, strides)
        length, offsets = region.runs()
        run_bytes, at = length * bits // 8, 0
        for offset in offsets:
            run = flat[at : at + run_bytes]
            if self._digests is not None:
                self._digests.add(base, base + offset * bits // 8, run)
            self._file.write(run, base + offset * bits // 8)
            at += run_bytes


class _FileRegion:
    scale: Tensor | None = None

    def __init__(self, sink: ShardSink, placement: Placement) -> None:
        self._sink, self._placement = sink, placement

    def view(self, piece: Piece) -> None:
        return None

    def written(self, piece: Piece) -> None:
        pass

    def put(self, piece: Piece, values: Stored) -> None:
        placement = self._placement
        if isinstance(values, Packed):
            self._put_packed(piece, values)
            return
        bits = dtypes.moved_bits(placement.dtype_name)
        values = self._sink._to_bytes(placement.scheme, values.to(placement.dtype))
        extent = self._sink._extents[placement.name]
        self._sink.write_box(extent, placement.stored_shape, piece.box.slices, values, bits)

    def _put_packed(self, piece: Piece, values: Packed) -> None:
        name, whole = self._placement.name, Packed.boxes(self._placement.stored_shape)
        boxes = zip(Packed.boxes(piece.dst_off), Packed.boxes(piece.dst_end), strict=True)
        bases = self._sink._extents[name], self._sink._group_extents[name]
        for base, shape, (off, end), part in zip(bases, whole, boxes, values, strict=True):
            self._sink.write_box(base, shape, tuple(map(slice, off, end)), part, 8)

    def put_scale(self, cells: tuple[slice, ...], values: Tensor) -> None:
        placement = self._placement
        cast = self._sink._cast_scale(placement, values)
        base = self._sink._scale_extents[placement.name]
        self._sink.write_box(base, placement.scale_grid, cells, cast, cast.dtype.itemsize * 8)

    def view_scale(self, cells: tuple[slice, ...]) -> Tensor | None:
        return None

    def close(self) -> None:
        pass
