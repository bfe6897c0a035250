"""On a CPU: once a chunk's bytes are in memory, they are scaled, quantized and placed, in tiles that a cache holds.

Each worker thread of the ring has a press of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..elements.pieces import Piece
from ..errors import WeightError
from ..machine import now
from ..numerics import schemes
from ..numerics.schemes import Scheme
from ..planning.chunks import Chunk, Work, cut_tiles
from .nonfinite import nonfinite_text
from .ring import Slot

if TYPE_CHECKING:
    from .stream import Stream


class Press:
    """Quantizes and places chunks, one at a time, for one thread."""

    def __init__(self, stream: Stream) -> None:
        budget = stream.budget
        self.stream = stream
        self.wide = torch.empty(budget.scratch_elements, dtype=torch.float32)
        self.bits = torch.empty(budget.scratch_elements, dtype=torch.float32)
        self.tile_elements = budget.scratch_elements
        self.out: Tensor | None = None  # where the sink has no memory to quantize into

    def take(self, chunk: Chunk, slot: Slot, nbytes: int) -> None:
        """Do what the plan says with a chunk that has been read into ``slot``."""
        started = now()
        with torch.no_grad():
            placed = self._place(chunk, self._elements(chunk, slot.buffer[:nbytes]))
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
            nbytes = self.stream.budget.slot_bytes // 2
            self.out = torch.empty(nbytes, dtype=schemes.FP8)
        return self.out[: piece.numel].view(piece.size)

    def _amax(self, x: Tensor, chunk: Chunk, scheme: Scheme) -> Tensor:
        scratch = self.bits.view(x.dtype)
        grid = [cells.stop - cells.start for cells in chunk.cells]
        tiles = cut_tiles(chunk.piece.size, scheme, chunk.phase, self.tile_elements)
        if len(tiles) == 1:
            return schemes.group_amax(x, scheme, phase=chunk.phase, scratch=scratch)
        amax = torch.zeros(grid, dtype=torch.float32)
        for tile in tiles:
            region = amax[tile.cells]
            part = schemes.group_amax(tile.region(x), scheme, phase=tile.phase, scratch=scratch)
            region.copy_(torch.maximum(region, part))
        return amax

    def _check_finite(self, amax: Tensor, chunk: Chunk, x: Tensor) -> None:
        if bool(torch.isfinite(amax).all()):
            return
        raise WeightError(nonfinite_text(self.stream.checkpoint, chunk.piece, x, chunk.placement))
