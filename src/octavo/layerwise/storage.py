"""FP8 numbers and scales of one parameter, filled box by box from high-precision values, in bounded memory.

The bytes are those of `octavo.schemes.quantize` of the whole parameter with its parts, whatever the boxes: each box
must hold whole scale groups. Nothing is written before a box's scales are known to be finite, unless the box is on
another device and larger than the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import schemes
from ..chunks import Tile, cut_tiles
from ..errors import WeightError
from ..pieces import Piece
from ..schemes import Scheme
from .boxes import Box

#: elements of a tile on a CPU: what stays in a core's cache
_TILE_ELEMENTS = 1 << 19


class Quantizer:
    """Quantizes boxes with scratch memory of its own: at most ``staging_bytes`` beside the values and the result."""

    def __init__(self, staging_bytes: int) -> None:
        self.staging_bytes = staging_bytes
        self._scratch: Tensor | None = None
        self._pinned: list[_Pinned] = []
        self._unchecked: list[tuple[str, Tensor]] = []  # flags on an accelerator: looking at each would wait for it

    def quantize(self, out: Tensor, values: Tensor, dtype: torch.dtype | None, scheme: Scheme, what: str) -> Tensor:
        """Write ``values[..., rows, cols]``, cast to ``dtype`` (None: as they are), as FP8 into ``out``.

        The first row and column begin scale groups.

        Returns:
            the scales, float32 [..., row cells, column cells], on ``out``'s device.

        Raises:
            WeightError: ``what`` holds values that are not finite.
        """
        dtype = dtype or values.dtype
        on_cpu = out.device.type == "cpu"
        near = values.device == out.device
        if not near and values.nbytes <= self.staging_bytes // 4:
            values, near = self._sent(values, out.device), True
        # where values are at hand, tiles bound float32 temporaries, else also what has crossed to the device
        limit = _TILE_ELEMENTS if on_cpu else self.staging_bytes // (8 if near else 32)
        tiles = cut_tiles(tuple(out.shape), scheme, (0, 0), limit)
        *lead, rows, cols = out.shape
        grid = torch.zeros((*lead, *scheme.cells(rows, cols)), dtype=torch.float32, device=out.device)

        def tile_of(tile: Tile) -> Tensor:
            return tile.region(values).to(out.device, dtype)

        def amax(tile: Tile, region: Tensor) -> None:
            found = schemes.group_amax(region, scheme, phase=tile.phase, scratch=self._scratch_like(region))
            cells = grid[tile.cells]
            torch.maximum(cells, found, out=cells)

        def write(tile: Tile, region: Tensor, scale: Tensor) -> None:
            place, scratch = tile.region(out), self._scratch_like(region, torch.float32)
            schemes.quantize_into(place, region, scale, scheme, phase=tile.phase, scratch=scratch)

        whole_groups = sum(grid[tile.cells].numel() for tile in tiles) == grid.numel()
        if not near and whole_groups:  # each tile crosses to the device once
            for tile in tiles:
                region = tile_of(tile)
                amax(tile, region)
                write(tile, region, schemes.scale_from_amax(grid[tile.cells], scheme))
            self._note(grid, what)
            return schemes.scale_from_amax(grid, scheme)
        for tile in tiles:
            amax(tile, tile_of(tile))
        self._note(grid, what)
        scale = schemes.scale_from_amax(grid, scheme)
        for tile in tiles:
            write(tile, tile_of(tile), scale[tile.cells])
        return scale

    def check(self) -> None:
        """Raise for what was quantized on an accelerator and was not finite."""
        flagged, self._unchecked = self._unchecked, []
        if flagged and not bool(torch.stack([flag for _, flag in flagged]).all()):
            raise WeightError(next(_nonfinite(what) for what, flag in flagged if not flag))

    def forget(self) -> None:
        """Nothing that went before is checked."""
        self._unchecked = []

    def _note(self, grid: Tensor, what: str) -> None:
        finite = torch.isfinite(grid).all()
        if grid.device.type != "cpu":
            self._unchecked.append((what, finite))
        elif not finite:
            raise WeightError(_nonfinite(what))

    def _sent(self, values: Tensor, device: torch.device) -> Tensor:
        """Values on the device. Those in pageable memory go through pinned buffers, two in turn."""
        if device.type != "cuda" or values.is_pinned() or not values.numel():
            return values.to(device)  # blocks: whoever owns the values may change them afterwards
        if not self._pinned:
            self._pinned = [_Pinned(self.staging_bytes // 4) for _ in range(2)]
        self._pinned.reverse()
        return self._pinned[0].send(values, device)

    def _scratch_like(self, region: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory for a tile's bits, or for its float32 values."""
        if region.device.type != "cpu" or region.numel() > _TILE_ELEMENTS:
            return None
        if self._scratch is None:
            self._scratch = torch.empty(2, _TILE_ELEMENTS, dtype=torch.float32, device="cpu")
        return self._scratch[0].view(region.dtype) if dtype is None else self._scratch[1]


class _Pinned:
    """A pinned buffer, and the event after which it may be filled again."""

    def __init__(self, nbytes: int) -> None:
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, values: Tensor, device: torch.device) -> Tensor:
        self._sent.synchronize()
        pinned = self._buffer[: values.nbytes].view(values.dtype).view(values.shape)
        pinned.copy_(values)
        sent = pinned.to(device, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(device))
        return sent


def _nonfinite(what: str) -> str:
    return (
        f"{what}: holds values that are not finite, which have no FP8 form. Repair the source, or ignore this weight."
    )


@dataclass
class QuantizedStorage:
    """``weight`` e4m3fn [..., out, in], and its scales once it is complete."""

    weight: Tensor
    scheme: Scheme
    parts: tuple[int, ...] | None = None  # known once complete: see `octavo.plan.Placement`
    scale: Tensor | None = None
    _grids: list[tuple[Box, Tensor]] = field(default_factory=list)  # scales of boxes, while parts are not known

    def __post_init__(self) -> None:
        if self.scale is None and self.scheme.group_rows == 1:  # scales are the same whatever the parts
            self.scale = self._empty_scale(None)

    def _empty_scale(self, parts: Sequence[int] | None) -> Tensor:
        shape = self.scheme.scale_shape(self.weight.shape, parts)
        return torch.empty(shape, dtype=self.scheme.scale_dtype, device=self.weight.device)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def split(self, piece: Piece) -> list[Piece]:
        """A piece, cut where parts begin."""
        if self.parts is None or self.scheme.group_rows == 1:
            return [piece]
        axis, cut, start = len(piece.size) - 2, [], 0
        for rows in self.parts:
            low, high = max(start, piece.dst_off[axis]), min(start + rows, piece.dst_end[axis])
            if low < high:
                cut.append(piece.narrow(axis, low - piece.dst_off[axis], high - low))
            start += rows
        return cut

    def holds_groups(self, box: Box) -> bool:
        """Whether a box, within one part, holds whole scale groups; rows count from its own where parts are unknown."""
        cols = self.weight.shape[-1]
        start, stop = box.off[-2], box.end[-2]
        if self.parts is not None:
            found = self._part_of(box)
            if found is None:
                return False
            _, start, stop = found
        return _aligned(box, -2, self.scheme.group_rows or stop - start, start, stop) and _aligned(
            box, -1, self.scheme.group_cols or cols, 0, cols
        )

    def put(self, quantizer: Quantizer, piece: Piece, values: Tensor, dtype: torch.dtype | None, what: str) -> None:
        """Quantize ``values`` of the piece's size, which holds whole scale groups."""
        box = Box.of(piece)
        grid = quantizer.quantize(piece.region(self.weight), values, dtype, self.scheme, what)
        if self.scale is None:
            self._grids.append((box, grid))
        else:
            self._store(box, grid)

    def seal(self, parts: Sequence[int]) -> Box | None:
        """All boxes are there: fix the parts, gather the scales. Returns a box that cuts a group, if there is one."""
        assert self.parts is None
        self.parts = tuple(parts)
        for box, _ in self._grids:
            if not self.holds_groups(box):
                return box
        self.scale = self._empty_scale(self.parts) if self.scale is None else self.scale
        for box, grid in self._grids:
            self._store(box, grid)
        self._grids = []
        return None

    def _store(self, box: Box, grid: Tensor) -> None:
        assert self.scale is not None
        found = self._part_of(box)
        assert found is not None
        index, start, _ = found
        *lead, total, cols = self.weight.shape
        parts = self.parts or (total,)
        cell_rows = [self.scheme.cells(rows, cols)[0] for rows in parts]
        row = sum(cell_rows[:index]) + (box.off[-2] - start) // (self.scheme.group_rows or parts[index])
        col = box.off[-1] // (self.scheme.group_cols or cols)
        cells = self.scale.view(*lead, sum(cell_rows), self.scheme.cells(1, cols)[1])
        place = cells[(*box.slices[:-2], slice(row, row + grid.shape[-2]), slice(col, col + grid.shape[-1]))]
        place.copy_(schemes.to_stored(grid, self.scheme))

    def _part_of(self, box: Box) -> tuple[int, int, int] | None:
        """The part that holds a box: its number, first row and end. Where rows have their own groups, all are one."""
        if self.scheme.group_rows == 1:
            return 0, 0, self.weight.shape[-2]
        assert self.parts is not None
        start = 0
        for index, rows in enumerate(self.parts):
            if start <= box.off[-2] and box.end[-2] <= start + rows:
                return index, start, start + rows
            start += rows
        return None


def _aligned(box: Box, axis: int, group: int, start: int, stop: int) -> bool:
    low, high = box.off[axis], box.end[axis]
    return (low - start) % group == 0 and (high == stop or (high - start) % group == 0)


def values_of(piece: Piece, values: Tensor) -> Tensor:
    """What a piece takes of the tensor that is written: a view."""
    return values.as_strided(piece.size, piece.src_strides, piece.src_off)
