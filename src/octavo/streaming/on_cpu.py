"""On a CPU: once a chunk's bytes are in memory, they are scaled, quantized and placed, in tiles that a cache holds.

Each worker thread of the ring has a press of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..elements.pieces import Piece
from ..errors import WeightError
from ..numerics import schemes
from ..numerics.groups import count_cells
from ..numerics.schemes import Scheme
from ..planning.budget import Budget
from ..planning.chunks import Chunk, Tile, Work, cut_tiles
from .nonfinite import nonfinite_text
from .placed import Placed


class Tiles:
    """The arithmetic of boxes, a tile at a time, with scratch memory for one tile on a CPU.

    Args:
        elements: of the largest tile; two float32 of scratch each, on a CPU.
        device: where values are brought before anything is done to them.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.elements, self.device = elements, device
        on_cpu = device.type == "cpu"
        self.bits = torch.empty(elements, dtype=torch.float32, device="cpu") if on_cpu else None
        self.wide = torch.empty(elements, dtype=torch.float32, device="cpu") if on_cpu else None

    def amax(self, x: Tensor, scheme: Scheme, phase: tuple[int, int], dtype: torch.dtype | None = None) -> Tensor:
        """`schemes.group_amax` of ``x``, cast to ``dtype`` before (None: as it is)."""
        tiles = cut_tiles(tuple(x.shape), scheme, phase, self.elements)
        if len(tiles) == 1:
            return self._amax(tiles[0], x, scheme, dtype)
        *lead, rows, cols = x.shape
        grid = torch.zeros(
            (
                *lead,
                count_cells(rows, scheme.group_rows, phase[0]),
                count_cells(cols, scheme.group_cols, phase[1]),
            ),
            dtype=torch.float32,
            device=self.device,
        )
        for tile in tiles:
            cells = grid[tile.cells]
            cells.copy_(torch.maximum(cells, self._amax(tile, x, scheme, dtype)))
        return grid

    def quantize(
        self,
        out: Tensor,
        x: Tensor,
        scale: Tensor,
        scheme: Scheme,
        phase: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`schemes.quantize_into` of ``x``, cast to ``dtype`` before (None: as it is)."""
        for tile in cut_tiles(tuple(x.shape), scheme, phase, self.elements):
            region, cells = self._region(tile, x, dtype), scale[tile.cells]
            schemes.quantize_into(tile.region(out), region, cells, scheme, phase=tile.phase, scratch=self.wide)

    def _amax(self, tile: Tile, x: Tensor, scheme: Scheme, dtype: torch.dtype | None) -> Tensor:
        region = self._region(tile, x, dtype)
        scratch = None if self.bits is None else self.bits.view(region.dtype)
        return schemes.group_amax(region, scheme, phase=tile.phase, scratch=scratch)

    def _region(self, tile: Tile, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        region = tile.region(x)
        return region if dtype is None else region.to(self.device, dtype)


class Press:
    """Quantizes and places chunks, one at a time, for one thread."""

    def __init__(self, checkpoint: Checkpoint, budget: Budget, placed: Placed) -> None:
        self._checkpoint, self._placed = checkpoint, placed
        self._out_bytes = budget.slot_bytes // 2
        self.tiles = Tiles(budget.scratch_elements, budget.device)
        self.out: Tensor | None = None  # where the sink has no memory to quantize into

    @torch.no_grad()
    def take(self, chunk: Chunk, flat: Tensor) -> int:
        """Do what the plan says with a chunk, whose bytes are in file order.

        Returns the bytes that are placed by it.
        """
        if chunk.piece.numel:
            self._place(chunk, self._elements(chunk, flat))
        return self._placed.done(chunk.placement, chunk.work, chunk.piece)

    def _elements(self, chunk: Chunk, flat: Tensor) -> Tensor:
        """Bytes in file order -> a tensor of the piece's size (a view)."""
        dtype = dtypes.MOVED[self._checkpoint.tensors[chunk.piece.src_name].dtype_name]
        return chunk.piece.from_file_order(flat.view(dtype))

    def _place(self, chunk: Chunk, x: Tensor) -> None:
        placement, piece = chunk.placement, chunk.piece
        mine = placement.partition(piece, chunk.cells, chunk.phase)
        if chunk.work is Work.COPY:
            assert mine is not None
            self._placed.destination(placement).put(mine.piece, mine.of(x))
            return
        scheme = schemes.get(placement.scheme or "")
        if chunk.work is Work.REREAD:
            amax = self._placed.wait_amax(placement, chunk.cells, chunk.unit)
        else:
            amax = self.tiles.amax(x, scheme, chunk.phase)
            if not bool(torch.isfinite(amax).all()):
                raise WeightError(nonfinite_text(self._checkpoint, piece, x, placement))
        if chunk.work is Work.AMAX:
            self._placed.fold(placement, chunk.cells, amax, chunk.unit)
            return
        assert mine is not None
        destination, scale = self._placed.destination(placement), schemes.scale_from_amax(mine.of_scales(amax), scheme)
        destination.put_scale(mine.cells, schemes.to_stored(scale, scheme))
        view = destination.view(mine.piece)
        out = self._scratch(mine.piece, scheme) if view is None else view
        self.tiles.quantize(out, mine.of(x), scale, scheme, mine.phase)
        if view is None:
            destination.put(mine.piece, out)

    def _scratch(self, piece: Piece, scheme: Scheme) -> Tensor:
        if self.out is None:
            self.out = torch.empty(self._out_bytes, dtype=torch.uint8)
        return self.out[: piece.numel].view(scheme.dtype).view(piece.size)
