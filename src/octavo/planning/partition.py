"""The columns of a matrix that have a place here, where the others are other ranks'.

The rows of such a matrix are read whole: a rank's part of each row would be a short read of its own, and under
fp8_channel the scale is that of the whole row. All ranks then compute the bytes that a conversion writes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..elements.pieces import Piece, put_at


class Partition(NamedTuple):
    """What of a box that was read has a place here, and where: offsets count within what is stored."""

    piece: Piece
    cells: tuple[slice, ...]  # () where nothing is quantized
    phase: tuple[int, int]  # row and column within their scale group at which they begin
    columns: slice | None = None  # of the box; None: all
    scale_columns: slice | None = None  # of the box's scales; None: all

    def of(self, values: Tensor) -> Tensor:
        """The columns of the box's values (a view)."""
        return values if self.columns is None else values[..., self.columns]

    def of_scales(self, scales: Tensor) -> Tensor:
        """The columns of the box's scales (a view)."""
        return scales if self.scale_columns is None else scales[..., self.scale_columns]


def stored_cells(columns: tuple[int, int], group: int | None) -> tuple[int, int]:
    """The first cell of some columns, and how many they have."""
    if group is None:
        return 0, 1
    first = columns[0] // group
    return first, -(-columns[1] // group) - first


def partition_of(
    piece: Piece, cells: tuple[slice, ...], phase: tuple[int, int], columns: tuple[int, int], group: int | None
) -> Partition | None:
    """What of a box lies in ``columns``; None where nothing does. Groups are ``group`` columns wide, or all."""
    axis = len(piece.size) - 1
    start, stop = piece.dst_off[axis], piece.dst_end[axis]
    low, high = max(start, columns[0]), min(stop, columns[1])
    if low >= high:
        return None
    mine = piece.narrow(axis, low - start, high - low)
    mine = mine._replace(dst_off=put_at(mine.dst_off, axis, low - columns[0]))
    within = slice(low - start, high - start)
    if not cells or group is None:
        return Partition(mine, cells, phase, within)
    first, count = stored_cells((low, high), group)
    home = first - columns[0] // group
    at = first - cells[-1].start
    return Partition(
        mine, (*cells[:-1], slice(home, home + count)), (phase[0], low % group), within, slice(at, at + count)
    )
