"""FP8 numbers and scales of one parameter: which boxes hold whole scale groups, and where the scales of a box go."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...checkpoint import dtypes
from ...elements.boxes import Box
from ...elements.operations import offset_of
from ...elements.pieces import Piece
from ...numerics.schemes import Scheme
from ...planning.placement import Placement


@dataclass
class QuantizedStorage:
    """``weight`` e4m3fn [..., out, in], and its scales once it is complete."""

    name: str
    weight: Tensor
    scheme: Scheme
    parts: tuple[int, ...] | None = None  # known once complete: see `octavo.planning.placement.Placement`
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
        if self.parts is None or len(self.parts) == 1 or self.scheme.group_rows == 1:
            return [piece]
        axis, cut, start = len(piece.size) - 2, [], 0
        for rows in self.parts:
            low, high = max(start, piece.dst_off[axis]), min(start + rows, piece.dst_end[axis])
            if high - low == piece.size[axis]:
                return [piece]
            if low < high:
                cut.append(piece.narrow(axis, low - piece.dst_off[axis], high - low))
            start += rows
        return cut

    def holds_groups(self, box: Box) -> bool:
        """Whether a box, within one part, holds whole scale groups; rows count from its own where parts are unknown."""
        return _holds_groups(self.weight.shape, self.parts, self.scheme, box)

    @functools.cached_property
    def placement(self) -> Placement:
        """This storage in the words of plans."""
        shape, name = tuple(self.weight.shape), self.scheme.name
        parts, device = self.parts or (shape[-2],), str(self.weight.device)
        return Placement(self.name, shape, dtypes.NAMES[self.weight.dtype], (), name, "", (), parts, device, 0)

    def scale_place(self, box: Box) -> Tensor:
        """Where the scales of a box go, [..., row cells, column cells] in the stored dtype.

        While parts are not known that is memory of the box's own, which `seal` gathers.
        """
        if self.scale is not None:
            return self.grid[self.cells(box)]
        shape = (*box.size[:-2], *self.scheme.cells(*box.size[-2:]))
        own = torch.empty(shape, dtype=self.scheme.scale_dtype, device=self.weight.device)
        self._grids.append((box, own))
        return own

    def seal(self, parts: Sequence[int]) -> Box | None:
        """All boxes are there: fix the parts, gather the scales. Returns a box that cuts a group, if there is one."""
        assert self.parts is None
        self.parts = tuple(parts)
        for box, _ in self._grids:
            if not self.holds_groups(box):
                return box
        self.scale = self._empty_scale(self.parts) if self.scale is None else self.scale
        grids, self._grids = self._grids, []
        for box, grid in grids:
            self.scale_place(box).copy_(grid)
        return None

    @property
    def grid(self) -> Tensor:
        """The scale with its [row cells, column cells] spelled out."""
        assert self.scale is not None
        *lead, total, cols = self.weight.shape
        rows = sum(self.scheme.cells(part, cols)[0] for part in self.parts or (total,))
        return self.scale.view(*lead, rows, self.scheme.cells(1, cols)[1])

    def cells(self, box: Box) -> tuple[slice, ...]:
        """The scale groups of a box, which holds them whole, in the `grid`."""
        return _cells(self.weight.shape, self.parts, self.scheme, box)


# the layers of a model are alike

_Parts = tuple[int, ...] | None


@functools.lru_cache(maxsize=4096)
def _holds_groups(shape: tuple[int, ...], parts: _Parts, scheme: Scheme, box: Box) -> bool:
    cols, start, stop = shape[-1], box.off[-2], box.end[-2]
    if parts is not None:
        found = _part_of(shape, parts, scheme, box)
        if found is None:
            return False
        _, start, stop = found
    return _aligned(box, -2, scheme.group_rows or stop - start, start, stop) and _aligned(
        box, -1, scheme.group_cols or cols, 0, cols
    )


@functools.lru_cache(maxsize=4096)
def _cells(shape: tuple[int, ...], parts: _Parts, scheme: Scheme, box: Box) -> tuple[slice, ...]:
    found = _part_of(shape, parts, scheme, box)
    assert found is not None
    index, start, _ = found
    total, cols = shape[-2:]
    parts = parts or (total,)
    before = sum(scheme.cells(rows, cols)[0] for rows in parts[:index])
    row = before + (box.off[-2] - start) // (scheme.group_rows or parts[index])
    col = box.off[-1] // (scheme.group_cols or cols)
    rows, columns = scheme.cells(*box.size[-2:])
    return (*box.slices[:-2], slice(row, row + rows), slice(col, col + columns))


def _part_of(shape: tuple[int, ...], parts: _Parts, scheme: Scheme, box: Box) -> tuple[int, int, int] | None:
    """The part that holds a box: its number, first row and end. Where rows have their own groups, all are one."""
    if scheme.group_rows == 1:
        return 0, 0, shape[-2]
    assert parts is not None
    start = 0
    for index, rows in enumerate(parts):
        if start <= box.off[-2] and box.end[-2] <= start + rows:
            return index, start, start + rows
        start += rows
    return None


def _aligned(box: Box, axis: int, group: int, start: int, stop: int) -> bool:
    low, high = box.off[axis], box.end[axis]
    return (low - start) % group == 0 and (high == stop or (high - start) % group == 0)


def values_of(piece: Piece, values: Tensor) -> Tensor:
    """What a piece takes of the tensor that is written: a view, or all of it."""
    whole = piece.size == values.shape and piece.src_strides == values.stride() and piece.src_off == offset_of(values)
    if whole and values.untyped_storage().nbytes():
        return values
    # which refuses, too, values whose memory was given back
    return values.as_strided(piece.size, piece.src_strides, piece.src_off)
