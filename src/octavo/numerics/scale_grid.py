"""The scale grid of a parameter: which scale each element has, and where a box may be cut.

Groups are those of one matrix ``[out, in]``, or of one *part* of its rows: rows of different parts never share a group.
A grid has a *cell* for each group, ``[..., row cells, column cells]``, the cells of the parts one after another. Under
fp8_block, gate and up of 1,400 rows each have 11 + 11 rows of cells.

Offsets and sizes are in elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from ..elements.boxes import Box
from .groups import count_cells
from .schemes import Scheme

Cells = tuple[slice, ...]
Phase = tuple[int, int]


class Part(NamedTuple):
    """Rows [start, stop) that share no group with others, and the first of their rows of cells."""

    start: int
    stop: int
    first_cell: int


class ScaleGrid(NamedTuple):
    """Cells of a parameter of ``shape`` [..., out, in] whose rows are quantized in ``parts``.

    Immutable and hashable: the layers of a model are alike, so what is asked of one grid is remembered for all.
    """

    shape: tuple[int, ...]
    scheme: Scheme
    parts: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], scheme: Scheme, parts: Sequence[int] | None = None) -> ScaleGrid:
        """The grid of a parameter; its rows are one part unless ``parts`` says otherwise."""
        return cls(tuple(shape), scheme, tuple(parts or (shape[-2],)))

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """[..., row cells, column cells]."""
        rows = sum(self.scheme.cells(part, self.shape[-1])[0] for part in self.parts)
        return (*self.shape[:-2], rows, self.scheme.cells(1, self.shape[-1])[1])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in which scales are stored: that of the grid, but ``[]`` for a lone matrix with one group."""
        return self.scheme.scale_shape(self.shape, self.parts)

    @property
    def each_part(self) -> tuple[Part, ...]:
        """The parts, from the first row on."""
        return _each_part(self)

    def place(self, box: Box, number: int) -> tuple[Cells, Phase]:
        """The cells of a box within a part, and the row and column within its group at which it begins."""
        part = self.each_part[number]
        return cells_of(box, self.scheme, (part.start, 0), part.first_cell)

    def part_of(self, box: Box) -> Part | None:
        """The part that holds all rows of a box; None if there is none. Where each row is a group, all are one part."""
        if self.scheme.group_rows == 1:
            return Part(0, self.shape[-2], 0)
        first, stop = box.off[-2], box.off[-2] + box.size[-2]
        return next((part for part in self.each_part if part.start <= first and stop <= part.stop), None)

    def holds_groups(self, box: Box) -> bool:
        """Return True if a box lies within one part and cuts no group."""
        part = self.part_of(box)
        return part is not None and cuts_no_group(box, self.scheme, (part.start, part.stop), self.shape[-1])

    def cells(self, box: Box) -> Cells:
        """The cells of a box that lies within one part."""
        return _cells(self, box)


def cells_of(box: Box, scheme: Scheme, origin: tuple[int, int], first_cell: int = 0) -> tuple[Cells, Phase]:
    """The cells of a box, and the row and column within its group at which it begins.

    Args:
        origin: row and column from which groups are counted, which may lie before the first.
        first_cell: the row of cells at the origin.
    """
    cells, phase = _matrix_cells(box.off[-2:], box.size[-2:], scheme, origin, first_cell)
    lead = (slice(off, off + n) for off, n in zip(box.off[:-2], box.size, strict=False))
    return (*lead, *cells), phase


def cuts_no_group(box: Box, scheme: Scheme, rows: tuple[int, int], cols: int) -> bool:
    """Return True if a box holds whole groups only, of a part with the rows [start, stop) and so many columns."""
    return _whole_groups(box.off[-2:], box.size[-2:], scheme, rows, cols)


# a model has thousands of boxes, and few shapes of them: what follows is asked of matrices alone, and remembered


@functools.lru_cache(maxsize=4096)
def _each_part(grid: ScaleGrid) -> tuple[Part, ...]:
    found, start, cell = [], 0, 0
    for rows in grid.parts:
        found.append(Part(start, start + rows, cell))
        start, cell = start + rows, cell + grid.scheme.cells(rows, grid.shape[-1])[0]
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _cells(grid: ScaleGrid, box: Box) -> Cells:
    part = grid.part_of(box)
    assert part is not None
    return cells_of(box, grid.scheme, (part.start, 0), part.first_cell)[0]


@functools.lru_cache(maxsize=4096)
def _whole_groups(
    off: tuple[int, ...], size: tuple[int, ...], scheme: Scheme, rows: tuple[int, int], cols: int
) -> bool:
    groups = (scheme.group_rows or rows[1] - rows[0], scheme.group_cols or cols)
    for low, length, group, (start, stop) in zip(off, size, groups, (rows, (0, cols)), strict=True):
        if (low - start) % group or (low + length != stop and (low + length - start) % group):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _matrix_cells(
    off: tuple[int, ...], size: tuple[int, ...], scheme: Scheme, origin: tuple[int, int], first_cell: int
) -> tuple[tuple[slice, slice], Phase]:
    row_cells, row_phase = _along(off[0] - origin[0], size[0], scheme.group_rows, first_cell)
    col_cells, col_phase = _along(off[1] - origin[1], size[1], scheme.group_cols, 0)
    return (row_cells, col_cells), (row_phase, col_phase)


def _along(off: int, length: int, group: int | None, first_cell: int) -> tuple[slice, int]:
    cell, phase = divmod(off, group) if group else (0, 0)
    return slice(first_cell + cell, first_cell + cell + count_cells(length, group, phase)), phase
