"""What becomes of a chunk once its bytes are in host memory: copy to the device, scale, quantize, place.

On a CPU each worker thread of the ring has a press of its own. On a GPU there is one, in one thread, since a dozen
threads that launch kernels mostly wait for each other (measured: 28.6 GB took 5.5 s with sixteen, 3.7 s with four); it
spreads chunks over a few streams (*lanes*), so that one is copied while another is quantized.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from . import dtypes, schemes
from .checkpoint import Checkpoint
from .chunks import Chunk, Work, cut_tiles
from .errors import WeightError
from .pieces import Piece, contiguous_strides
from .plan import Placement
from .ring import Slot, now
from .schemes import Scheme

if TYPE_CHECKING:
    from .stream import Stream


class _Lane:
    """A stream of the device, and the memory into which it copies chunks."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.staged = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.queue: Any = None
        if device.type == "cuda":
            self.queue = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.queue.wait_stream(torch.cuda.current_stream(device))

    def copy(self, slot: Slot, nbytes: int) -> Tensor:
        """The slot's bytes on the device; the slot is busy until they have left it."""
        staged = self.staged[:nbytes].copy_(slot.buffer[:nbytes], non_blocking=self.queue is not None)
        if self.queue is not None:
            slot.busy = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.busy.record(self.queue)
        return staged


class Press:
    """Quantizes and places chunks, one at a time, for one thread."""

    def __init__(self, stream: Stream, lanes: int = 1, *, check_later: bool = False) -> None:
        geometry = stream.geometry
        self.stream, self.device = stream, geometry.device
        on_cpu = self.device.type == "cpu"
        self.wide = torch.empty(geometry.scratch_elements, dtype=torch.float32)
        self.bits = torch.empty(geometry.scratch_elements, dtype=torch.float32)
        self.tile_elements = geometry.scratch_elements or geometry.slot_bytes
        self.lanes = [] if on_cpu else [_Lane(geometry.slot_bytes, self.device) for _ in range(lanes)]
        self.out: Tensor | None = None  # where the sink has no memory to quantize into
        self.check_later = check_later  # finding non-finite weights at once would wait for the device
        self.turn = 0

    def close(self) -> None:
        """Wait for the device."""
        for lane in self.lanes:
            if lane.queue is not None:
                lane.queue.synchronize()

    def take(self, chunk: Chunk, slot: Slot, nbytes: int) -> None:
        """Do what the plan says with a chunk that has been read into ``slot``."""
        started = now()
        with torch.no_grad():
            if not self.lanes:
                placed = self._place(chunk, self._elements(chunk, slot.buffer[:nbytes]))
            else:
                # chunks of a group that spans several follow each other in one lane
                spans = chunk.work in (Work.AMAX, Work.REREAD)
                lane = self.lanes[0 if spans else self.turn]
                self.turn = (self.turn + 1) % len(self.lanes)
                with torch.cuda.stream(lane.queue) if lane.queue is not None else contextlib.nullcontext():
                    placed = self._place(chunk, self._elements(chunk, lane.copy(slot, nbytes)))
                    if spans and lane.queue is not None:
                        lane.queue.synchronize()
        self.stream.done(chunk, now() - started, placed)

    def _elements(self, chunk: Chunk, flat: Tensor) -> Tensor:
        """Bytes in file order -> a tensor of the piece's size (a view)."""
        piece, info = chunk.piece, self.stream.checkpoint.tensors[chunk.piece.src_name]
        order = piece.file_order()
        in_file = flat.view(dtypes.MOVED[info.dtype_name]).view([piece.size[d] for d in order])
        return in_file.permute([order.index(d) for d in range(len(order))])

    def _place(self, chunk: Chunk, x: Tensor) -> int:
        """Returns the bytes that are now in their place."""
        if chunk.work is Work.COPY:
            self.stream.state(chunk.placement).destination.put(chunk.piece, x)
            return chunk.piece.numel * dtypes.moved_bits(chunk.placement.dtype_name) // 8
        return self._quantize(chunk, x)

    def _quantize(self, chunk: Chunk, x: Tensor) -> int:
        placement, piece = chunk.placement, chunk.piece
        assert placement.scheme is not None
        scheme = schemes.get(placement.scheme)
        destination = self.stream.state(placement).destination
        if chunk.work is Work.REREAD:
            amax = self.stream.wait_amax(chunk)
        else:
            amax = self._amax(x, chunk, scheme)
            if not self.check_later or destination.scale is None:
                self._check_finite(amax, chunk, x)
        if chunk.work is Work.AMAX:
            self.stream.add_amax(chunk, amax)
            return 0
        scale = schemes.scale_from_amax(amax, scheme)
        destination.put_scale(chunk.cells, schemes.to_stored(scale, scheme))
        view = destination.view(piece)
        out = self._scratch(piece) if view is None else view
        for tile in cut_tiles(piece.size, scheme, chunk.phase, self.tile_elements):
            schemes.quantize_into(
                tile.region(out), tile.region(x), scale[tile.cells], scheme, phase=tile.phase, scratch=self.wide
            )
        if view is None:
            destination.put(piece, out)
        return piece.numel

    def _scratch(self, piece: Piece) -> Tensor:
        if self.out is None:
            nbytes = self.stream.geometry.slot_bytes // 2
            self.out = torch.empty(nbytes, dtype=schemes.FP8, device=self.device)
        return self.out[: piece.numel].view(piece.size)

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
    """The first non-finite number among the values of a piece, its place in the checkpoint, and what to do about it."""
    position = torch.nonzero(~torch.isfinite(values))[0].tolist()
    info = checkpoint.tensors[piece.src_name]
    flat = piece.src_off + sum(at * stride for at, stride in zip(position, piece.src_strides, strict=True))
    where = [flat // stride % n for n, stride in zip(info.shape, contiguous_strides(info.shape), strict=True)]
    of = "" if placement.name == info.name else f", part of {placement.name}"
    return (
        f"{checkpoint.shard_of(info.name).path.name}: tensor {info.name!r} holds {values[tuple(position)].item()} "
        f"(at {where}){of}: a non-finite weight has no FP8 form. Repair the checkpoint, or keep it with "
        f"ignore=[{placement.name!r}]."
    )


def describe_nonfinite(checkpoint: Checkpoint, placement: Placement) -> str:
    """`_nonfinite` for a placement of which only the scales have been seen."""
    for piece in placement.pieces:
        with safe_open(checkpoint.shard_of(piece.src_name).path, "pt") as file:
            source = file.get_tensor(piece.src_name)
        values = source.reshape(-1).as_strided(piece.size, piece.src_strides, piece.src_off)
        if not bool(torch.isfinite(values).all()):
            return _nonfinite(checkpoint, piece, values, placement)
    raise AssertionError(f"{placement.name}: scales are not finite, but weights are")
