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
from ...numerics.scale_grid import ScaleGrid, cuts_no_group
from ...numerics.schemes import Scheme, Stored
from ...planning.placement import Placement


@dataclass
class QuantizedStorage:
    """``weight`` as a scheme stores it, [..., out, in] unless it packs, and its scales once it is complete."""

    name: str
    weight: Tensor
    scheme: Scheme
    parts: tuple[int, ...] | None = None  # known once complete: see `octavo.planning.placement.Placement`
    scale: Tensor | None = None
    _grids: list[tuple[Box, Tensor]] = field(default_factory=list)  # scales of boxes, while parts are not known

    def __post_init__(self) -> None:
        if self.scale is None and self.scheme.group_rows == 1:  # scales are the same whatever the parts
            self.scale = self._empty_scale(None)

    def hold(self, weight: Tensor, scale: Tensor) -> None:
        """Take other memory with the same values."""
        self.weight, self.scale = weight, scale
        self.__dict__.pop("numbers", None)

    def _empty_scale(self, parts: Sequence[int] | None) -> Tensor:
        shape = self.scheme.scale_shape(self.shape, parts)
        return torch.empty(shape, dtype=self.scheme.scale_dtype, device=self.weight.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in]."""
        return self.scheme.weight_shape(self.weight.shape)

    @functools.cached_property
    def numbers(self) -> Stored:
        """What is stored, as boxes can be taken of it."""
        return self.scheme.numbers_in(self.weight)

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
        """Return True if a box holds whole scale groups. While parts are not known, it counts as a part of its own."""
        if self.parts is None:
            return cuts_no_group(box, self.scheme, (box.off[-2], box.off[-2] + box.size[-2]), self.shape[-1])
        return self._scale_grid.holds_groups(box)

    @property
    def _scale_grid(self) -> ScaleGrid:
        return ScaleGrid.of(self.shape, self.scheme, self.parts)

    @functools.cached_property
    def placement(self) -> Placement:
        """This storage in the words of plans."""
        shape, name = self.shape, self.scheme.name
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
        return self.scale.view(self._scale_grid.grid_shape)

    def cells(self, box: Box) -> tuple[slice, ...]:
        """The scale groups of a box, which holds them whole, in the `grid`."""
        return self._scale_grid.cells(box)


def values_of(piece: Piece, values: Tensor) -> Tensor:
    """The values that a piece takes of the tensor that is written: a view, or all of it."""
    whole = piece.size == values.shape and piece.src_strides == values.stride() and piece.src_off == offset_of(values)
    if whole and values.untyped_storage().nbytes():
        return values
    # which refuses, too, values whose memory was given back
    return values.as_strided(piece.size, piece.src_strides, piece.src_off)
