"""Which elements of a matrix share a scale, as views in which scales can be broadcast.

A matrix is cut into groups from its first row and column on. Of whatever piece of it is at hand, ``phase`` says where
in its group it begins; groups may be cut at any end of a piece.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from torch import Tensor

#: rows and columns of a scale group; None: all
Groups = tuple[int | None, int | None]


class Span(NamedTuple):
    """A run of equally long cells: elements [start, stop), cells [cell, cell + cells), ``each`` elements a cell."""

    start: int
    stop: int
    cell: int
    cells: int
    each: int


def count_cells(length: int, group: int | None, phase: int = 0) -> int:
    """The number of scale groups along ``length`` elements, the first of which is ``phase`` into its group."""
    return 1 if group is None else math.ceil((phase + length) / group)


@functools.lru_cache(maxsize=4096)
def spans(length: int, group: int | None, phase: int = 0) -> tuple[Span, ...]:
    """Cut an axis of which element 0 is ``phase`` into its group: a partial head, whole cells, a partial tail."""
    if group is None:
        return (Span(0, length, 0, 1, length),)
    found = []
    head = min(length, -phase % group)
    if head:
        found.append(Span(0, head, 0, 1, head))
    cell = 1 if head else 0
    whole = (length - head) // group
    if whole:
        found.append(Span(head, head + whole * group, cell, whole, group))
    start = head + whole * group
    if start < length:
        found.append(Span(start, length, cell + whole, 1, length - start))
    return tuple(found)


def grouped(x: Tensor, rows: Span, cols: Span) -> Tensor:
    """View x[..., out, in] within the spans as [..., row cells, rows a cell, column cells, columns a cell]."""
    if rows.stop - rows.start != x.shape[-2] or cols.stop - cols.start != x.shape[-1]:
        x = x[..., rows.start : rows.stop, cols.start : cols.stop]
    # splitting an axis is a view, whatever the strides
    return x.view(*x.shape[:-2], rows.cells, rows.each, cols.cells, cols.each)


def cells_of_spans(scale: Tensor, rows: Span, cols: Span) -> Tensor:
    """The scales of the spans' groups, broadcastable to `grouped` weights."""
    if rows.cells != scale.shape[-2] or cols.cells != scale.shape[-1]:
        scale = scale[..., rows.cell : rows.cell + rows.cells, cols.cell : cols.cell + cols.cells]
    return scale.unsqueeze(-2).unsqueeze(-1)


def all_spans(x: Tensor, groups: Groups, phase: tuple[int, int] = (0, 0)) -> list[tuple[Span, Span]]:
    """Pairs of spans, of rows and of columns, that cover ``x[..., out, in]`` in groups of so many of each."""
    rows, cols = x.shape[-2:]
    return list(itertools.product(spans(rows, groups[0], phase[0]), spans(cols, groups[1], phase[1])))
