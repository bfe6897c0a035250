"""On a CPU: once a chunk's bytes are in memory, they are scaled, quantized and placed, in tiles that a cache holds.

Each worker thread of the ring has a press of its own.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..elements.pieces import Piece, whole
from ..errors import WeightError
from ..machine import on_cpu
from ..numerics import schemes
from ..numerics.decoding import holds_nan
from ..numerics.groups import count_cells
from ..numerics.lossless import lossless_scale
from ..numerics.recoding import AT_ONCE
from ..numerics.schemes import Scheme, Stored
from ..planning.budget import Budget
from ..planning.chunks import Chunk, Tile, Work, cut_apart, cut_boxes, cut_tiles
from ..planning.partition import Partition
from ..planning.placement import Placement
from .coded import Encoded
from .nonfinite import unfit, unfit_text
from .placed import Placed
from .sinks import Destination, quantize_to
from .staged import wait_for


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
        self.wide = torch.empty(elements, dtype=torch.float32, device=device) if on_cpu else None

    def amax(
        self, x: Tensor | Encoded, scheme: Scheme, phase: tuple[int, int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """`schemes.group_amax` of ``x``, cast to ``dtype`` before (None: as it is)."""
        compared = isinstance(x, Encoded) and x.compares(scheme)  # then scratch memory has a byte an element
        tiles = cut_tiles(tuple(x.shape), scheme, phase, self.elements * (4 if compared else 1))
        if len(tiles) == 1:
            return self._amax(tiles[0], x, scheme, dtype)
        grid = self._grid(tuple(x.shape), scheme, phase)
        for tile in tiles:
            cells = grid[tile.cells]
            cells.copy_(torch.maximum(cells, self._amax(tile, x, scheme, dtype)))
        return grid

    def quantize(
        self,
        out: Stored,
        x: Tensor | Encoded,
        scale: Tensor,
        scheme: Scheme,
        phase: tuple[int, int],
        dtype: torch.dtype | None = None,
    ) -> None:
        """`schemes.quantize_into` of ``x``, cast to ``dtype`` before (None: as it is)."""
        if isinstance(x, Encoded):
            tiles = cut_tiles(x.shape, scheme, phase, self.elements * self.at_once(x, scheme))
            for tile in tiles:
                self._requantize(tile.numbers(out), x, tile, scale[tile.cells], scheme)
            return
        for tile in cut_tiles(tuple(x.shape), scheme, phase, self.elements):
            cells, region = scale[tile.cells], self._region(tile, x, dtype)
            schemes.quantize_into(tile.numbers(out), region, cells, scheme, phase=tile.phase, scratch=self.wide)

    def at_once(self, x: Encoded, scheme: Scheme) -> int:
        """How many times its elements of scratch memory may be quantized at once."""
        return AT_ONCE if self.bits is not None and x.recodes(scheme) else 1

    def _requantize(self, out: Stored, x: Encoded, tile: Tile, scale: Tensor, scheme: Scheme) -> None:
        """Write the numbers of a tile of codes, whose amax has been looked at; if possible without decoding it."""
        if self.bits is not None and x.recodes(scheme):
            assert isinstance(out, Tensor)
            if x.recode(out, tile.box, scale, (self.scratch, self.bits)):
                return
        for part in cut_tiles(tile.box.size, scheme, tile.phase, self.elements):
            box = part.box._replace(dst_off=tuple(map(operator.add, tile.box.dst_off, part.box.dst_off)))
            wide = x.decode(box, self.scratch, self.bits, checked=True)
            cells = scale[part.cells]
            schemes.quantize_in_place(part.numbers(out), wide, cells, scheme, phase=part.phase, scratch=self.bits)

    def scale_and_quantize(
        self,
        out: Stored,
        x: Encoded,
        tiles: Sequence[Tile],
        scale_of: Callable[[Tensor], Tensor],
        scheme: Scheme,
        phase: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """`amax` and `quantize` in one, so that each tile is decoded once; returns the amax, and the scales.

        ``tiles`` hold whole groups; ``scale_of`` makes scales of an amax.
        """
        amax = self._grid(tuple(x.shape), scheme, phase)
        scales = torch.empty_like(amax)
        for tile in tiles:
            if self.bits is not None and x.recodes(scheme):
                cells = amax[tile.cells].copy_(x.amax(tile.box, scheme, self.bits))
                scale = scales[tile.cells].copy_(scale_of(cells))
                self._requantize(tile.numbers(out), x, tile, scale, scheme)
                continue
            region, cells = x.decode(tile.box, self.scratch, self.bits), amax[tile.cells]
            schemes.group_amax(region, scheme, phase=tile.phase, scratch=self.bits, out=cells)
            scale = scales[tile.cells].copy_(scale_of(cells))
            schemes.quantize_in_place(tile.numbers(out), region, scale, scheme, phase=tile.phase, scratch=self.bits)
        return amax, scales

    @property
    def scratch(self) -> Tensor:
        """Memory into which a tile of codes is decoded; on another device, taken when first needed."""
        if self.wide is None:
            self.wide = torch.empty(self.elements, dtype=torch.float32, device=self.device)
        return self.wide

    def _grid(self, shape: tuple[int, ...], scheme: Scheme, phase: tuple[int, int]) -> Tensor:
        *lead, rows, cols = shape
        cells = count_cells(rows, scheme.group_rows, phase[0]), count_cells(cols, scheme.group_cols, phase[1])
        return torch.zeros((*lead, *cells), dtype=torch.float32, device=self.device)

    def _amax(self, tile: Tile, x: Tensor | Encoded, scheme: Scheme, dtype: torch.dtype | None) -> Tensor:
        if isinstance(x, Encoded) and x.compares(scheme):  # nothing is decoded meanwhile
            return x.amax(tile.box, scheme, self.scratch if self.bits is None else self.bits)
        region = self._region(tile, x, dtype)
        scratch = None if self.bits is None else self.bits.view(region.dtype)
        return schemes.group_amax(region, scheme, phase=tile.phase, scratch=scratch)

    def _region(self, tile: Tile, x: Tensor | Encoded, dtype: torch.dtype | None) -> Tensor:
        if isinstance(x, Encoded):
            return x.decode(tile.box, self.scratch, self.bits)
        region = tile.region(x)
        return region if dtype is None else region.to(self.device, dtype)


class Press:
    """Quantizes and places chunks, one at a time, for one thread."""

    _compares = True  # codes of FP8 rather than weights, to find the largest of a row

    def __init__(self, checkpoint: Checkpoint, budget: Budget, placed: Placed) -> None:
        self._checkpoint, self._placed = checkpoint, placed
        self._out_bytes = budget.slot_bytes // 2
        self.tiles = Tiles(budget.scratch_elements, budget.device)
        self.out: Tensor | None = None  # where the sink has no memory to quantize into

    @torch.no_grad()
    def take(self, chunk: Chunk, read: Tensor | Encoded) -> int:
        """Do what the plan says with a chunk, whose bytes are in file order, or codes with their scales.

        Returns the bytes that are placed by it.
        """
        if chunk.piece.numel:
            self._place(chunk, read if isinstance(read, Encoded) else self._elements(chunk, read))
            if not on_cpu(chunk.placement.device):
                wait_for(torch.device(chunk.placement.device))
        return self._placed.done(chunk.placement, chunk.work, chunk.piece)

    def _elements(self, chunk: Chunk, flat: Tensor) -> Tensor:
        """Bytes in file order -> a tensor of the piece's size (a view)."""
        dtype = dtypes.MOVED[self._checkpoint.tensors[chunk.piece.src_name].dtype_name]
        return chunk.piece.from_file_order(flat.view(dtype))

    def _place(self, chunk: Chunk, x: Tensor | Encoded) -> None:
        placement, piece = chunk.placement, chunk.piece
        mine = placement.partition(piece, chunk.cells, chunk.phase)
        if chunk.work in (Work.COPY, Work.PASS):
            assert mine is not None
            if isinstance(x, Encoded):
                (self._pass if chunk.work is Work.PASS else self._decode)(chunk, mine, x)
            else:
                self._placed.destination(placement).put(mine.piece, mine.of(x))
            return
        scheme = placement.rule
        if chunk.work is Work.REREAD:
            amax = self._placed.wait_amax(placement, chunk.cells, chunk.unit)
        else:
            if isinstance(x, Encoded) and chunk.work is Work.QUANTIZE and self._at_once(chunk, x, scheme):
                return
            amax = self.tiles.amax(x, scheme, chunk.phase)
            self._check(amax, chunk, x)
        if chunk.work is Work.AMAX:
            self._fold(chunk, amax)
            return
        assert mine is not None
        destination, scale = self._placed.destination(placement), _scales(placement, x)(mine.of_scales(amax))
        destination.put_scale(mine.cells, schemes.to_stored(scale, scheme))
        part = _part(mine, x)
        self._quantize_to(
            destination, mine.piece, scheme, lambda out: self.tiles.quantize(out, part, scale, scheme, mine.phase)
        )

    def _check(self, amax: Tensor, chunk: Chunk, x: Tensor | Encoded) -> None:
        """Raise if an amax is not finite, which is that of a weight."""
        if not bool(torch.isfinite(amax).all()):
            values = (
                x if isinstance(x, Tensor) else x.decode(whole("", x.shape), torch.empty(x.numel, dtype=torch.float32))
            )
            raise WeightError(unfit_text(self._checkpoint, chunk.piece, values, chunk.placement))

    def _check_half(self, wide: Tensor, values: Tensor, piece: Piece, placement: Placement) -> None:
        """Raise if there is no number of fp16 for a weight; ``wide``, of which its values were made, is not needed any
        more.
        """
        if bool(torch.isinf(values).any()) and bool(unfit(wide, placement).any()):
            raise WeightError(unfit_text(self._checkpoint, piece, wide, placement))

    def _check_codes(self, codes: Tensor, chunk: Chunk, x: Encoded) -> None:
        """Raise if a code of FP8 is no number."""
        if holds_nan(codes):
            self._check(torch.tensor(math.nan), chunk, x)

    def _fold(self, chunk: Chunk, amax: Tensor) -> None:
        """Fold in the amax of a first reading."""
        self._placed.fold(chunk.placement, chunk.cells, amax, chunk.unit)

    def _view(self, destination: Destination, piece: Piece) -> Stored | None:
        """The memory of a box if a CPU can quantize into it."""
        view = destination.view(piece)
        return view if view is not None and schemes.in_host_memory(view) else None

    def _quantize_to(
        self, destination: Destination, piece: Piece, scheme: Scheme, quantize: Callable[[Stored], None]
    ) -> None:
        view = self._view(destination, piece)
        quantize_to(destination, piece, view, lambda: self._scratch(piece, scheme), quantize)

    def _scratch(self, piece: Piece, scheme: Scheme) -> Stored:
        if self.out is None:
            self.out = torch.empty(self._out_bytes, dtype=torch.uint8, device=self.tiles.device)
        return scheme.scratch(self.out, piece.size)

    # -- sources that are quantized already ---------------------------------------------------------------------------

    def _at_once(self, chunk: Chunk, x: Encoded, scheme: Scheme) -> bool:
        """Scale, quantize and place a chunk, each tile decoded once; False, and nothing is done, where that can't be.

        That is where tiles share scale groups; nor is it done where the amax is sooner found without decoding.
        """
        times = self.tiles.at_once(x, scheme)
        if chunk.placement.columns is not None or (self._compares and times == 1 and x.compares(scheme)):
            return False
        tiles = cut_apart(x.shape, scheme, chunk.phase, self.tiles.elements * times)
        if tiles is None:
            return False
        destination, scale_of = self._placed.destination(chunk.placement), _scales(chunk.placement, x)

        def quantize(out: Stored) -> None:
            amax, scales = self.tiles.scale_and_quantize(out, x, tiles, scale_of, scheme, chunk.phase)
            self._check(amax, chunk, x)
            destination.put_scale(chunk.cells, schemes.to_stored(scales, scheme))

        self._quantize_to(destination, chunk.piece, scheme, quantize)
        return True

    def _decode(self, chunk: Chunk, mine: Partition, x: Encoded) -> None:
        """Place what codes stand for."""
        destination, found = self._placed.destination(chunk.placement), x.part(mine.columns)
        for box in cut_boxes(mine.piece.size, self.tiles.elements):
            piece = mine.piece
            for axis, (off, n) in enumerate(zip(box.dst_off, box.size, strict=True)):
                piece = piece.narrow(axis, off, n)
            wide = found.decode(box, self.tiles.scratch, self.tiles.bits)
            values = wide.to(chunk.placement.dtype)
            if values.dtype == torch.float16:
                self._check_half(wide, values, piece, chunk.placement)
            destination.put(piece, values)

    def _pass(self, chunk: Chunk, mine: Partition, x: Encoded) -> None:
        """Place codes and scales as they are."""
        scheme, destination = chunk.placement.rule, self._placed.destination(chunk.placement)
        scale, codes = x.grid(scheme, chunk.phase), x.unpack()
        if codes.dtype.is_floating_point:
            self._check_codes(codes, chunk, x)
        destination.put_scale(mine.cells, schemes.to_stored(mine.of_scales(scale), scheme))
        destination.put(mine.piece, mine.of(codes))


def _scales(placement: Placement, x: Tensor | Encoded) -> Callable[[Tensor], Tensor]:
    """What makes scales of an amax."""
    if placement.lossless and isinstance(x, Encoded):
        return functools.partial(lossless_scale, unit=x.unit)
    return functools.partial(schemes.scale_from_amax, scheme=placement.rule)


def _part(mine: Partition, x: Tensor | Encoded) -> Tensor | Encoded:
    return mine.of(x) if isinstance(x, Tensor) else x.part(mine.columns)
