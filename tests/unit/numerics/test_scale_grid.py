"""The scale grid, against counting element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from octavo.elements.boxes import Box
from octavo.numerics import schemes
from octavo.numerics.scale_grid import ScaleGrid, cells_of

SCHEMES = [*schemes.SCHEMES.values(), schemes.Scheme("tiny blocks", 3, 2, False)]


def cell_of(grid: ScaleGrid, row: int, col: int) -> tuple[int, int]:
    """The cell of one element of a matrix, counted from the definition."""
    first_row = first_cell = 0
    for rows in grid.parts:
        group = grid.scheme.group_rows or rows
        if row < first_row + rows:
            return first_cell + (row - first_row) // group, col // (grid.scheme.group_cols or grid.shape[-1])
        first_row, first_cell = first_row + rows, first_cell + math.ceil(rows / group)
    raise AssertionError(row)


def elements(box: Box) -> list[tuple[int, int]]:
    rows, cols = (range(off, off + n) for off, n in zip(box.off[-2:], box.size[-2:], strict=True))
    return [(row, col) for row in rows for col in cols]


@st.composite
def grids(draw: st.DrawFn) -> ScaleGrid:
    parts: Sequence[int] = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    lead = draw(st.sampled_from([(), (2,)]))
    return ScaleGrid.of((*lead, sum(parts), draw(st.integers(1, 7))), draw(st.sampled_from(SCHEMES)), parts)


@st.composite
def boxes(draw: st.DrawFn, grid: ScaleGrid) -> Box:
    off = [draw(st.integers(0, n - 1)) for n in grid.shape]
    size = [draw(st.integers(1, n - at)) for n, at in zip(grid.shape, off, strict=True)]
    return Box(tuple(off), tuple(size))


@given(st.data())
def test_a_grid_has_a_cell_for_each_group(data):
    grid = data.draw(grids())
    rows, cols = grid.shape[-2:]
    found = {cell_of(grid, row, col) for row in range(rows) for col in range(cols)}
    *lead, cell_rows, cell_cols = grid.grid_shape
    assert found == {(r, c) for r in range(cell_rows) for c in range(cell_cols)}
    assert tuple(lead) == grid.shape[:-2]
    assert math.prod(grid.stored_shape) == math.prod(grid.grid_shape)


@given(st.data())
def test_the_cells_of_a_box_are_those_of_its_elements(data):
    grid = data.draw(grids())
    box = data.draw(boxes(grid))
    if grid.part_of(box) is None:
        return
    *_, rows, cols = grid.cells(box)
    found = {cell_of(grid, *element) for element in elements(box)}
    assert found == {(r, c) for r in range(rows.start, rows.stop) for c in range(cols.start, cols.stop)}


@given(st.data())
def test_a_box_holds_whole_groups_if_no_element_outside_shares_a_cell(data):
    grid = data.draw(grids())
    box = data.draw(boxes(grid))
    inside = set(elements(box))
    cells = {cell_of(grid, *element) for element in inside}
    rows, cols = (range(n) for n in grid.shape[-2:])
    cut = any(cell_of(grid, r, c) in cells for r in rows for c in cols if (r, c) not in inside)
    if grid.part_of(box) is None:
        assert not grid.holds_groups(box)
    else:
        assert grid.holds_groups(box) == (not cut)


@pytest.mark.parametrize(("off", "phase"), [((0, 0), (1, 0)), ((2, 1), (0, 1)), ((4, 3), (2, 1))])
def test_groups_may_be_counted_from_before_a_box(off, phase):
    _, found = cells_of(Box(off, (2, 2)), schemes.Scheme("tiny blocks", 3, 2, False), (-1, 0))
    assert found == phase
