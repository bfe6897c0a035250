"""The rows and columns that a loader takes of a tensor, in scale cells: whether its scale is cut as its weight is."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...conversion.packing import PACKED
from ...elements.boxes import Box
from ...elements.dry_run import Copy
from ...elements.views import View
from ...numerics.groups import Groups
from ...numerics.nvfp4 import GROUP, Packed
from ...numerics.schemes import Scheme


class _Cut(NamedTuple):
    """A matrix, or part of one, on its way from a source to a target; rows and columns counted in scale groups."""

    target: str
    at: tuple[int, ...]  # of the matrix within the target
    stack: tuple[tuple[int, int], ...]  # (how many, how far apart) matrices of the source, if it is a stack
    matrix: int  # of the source
    rows: tuple[int, int, int]  # to, from, how many
    cols: tuple[int, int, int]


class Grid(NamedTuple):
    """A weight as a loader is given it, and its scales."""

    shape: tuple[int, ...]
    groups: Groups  # how many of its rows and columns share a scale; None: all
    scale_shape: tuple[int, ...]

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, scheme: Scheme, shape: tuple[int, ...], each: int = 1) -> Grid:
        """The grid of a weight [..., out, in]; where several of its numbers are in one, these are its columns.

        Args:
            each: how many of its columns that is, where they share scales with all of their row.
        """
        if scheme.packed:
            codes, scales = Packed.boxes(shape)
            return cls(codes, (1, Packed.boxes((GROUP,))[0][-1]), scales)
        assert each == 1 or scheme.group_cols is None
        return cls((*shape[:-1], shape[-1] // each), scheme.groups, scheme.scale_shape(shape) or (1, 1))


def unequal(weights: Sequence[Copy], scales: Sequence[Copy], grid: Grid, suffix: str) -> str | None:
    """Say what the loader does so that scales don't lie beside their weights in the model; None if they do.

    Args:
        suffix: of the parameter with the scales, after that of the weight where it is not packed.
    """
    if _is_pair(weights, scales, grid, suffix):
        return None
    if weights and all(map(is_turned, weights)):
        weights, scales = [*map(_turned, weights)], [*map(_turned, scales)]
    expected, actual = set(), set()
    for copy in weights:
        cut = _cut(copy, grid.shape, grid.groups)
        if cut is None:
            return "rearranges it in a way that scales can't follow"
        expected.add(cut._replace(target=unpacked(copy.target) + suffix))
    for copy in scales:
        cut = _cut(copy, grid.scale_shape, (1, 1))
        if cut is None:
            return "rearranges its scale"
        actual.add(cut)
    if expected == actual or _row_by_row(expected) == _row_by_row(actual):
        return None
    return "does not cut its scale as it cuts the weight"


def paired(weights: Sequence[Copy], scales: Sequence[Copy], grid: Grid, suffix: str) -> list[tuple[Copy, Copy]] | None:
    """Each copy of a weight with that of its scales; None where a weight's are copied in several goes."""
    if _is_pair(weights, scales, grid, suffix):
        return [(weights[0], scales[0])]
    beside = {_cut(copy, grid.scale_shape, (1, 1)): copy for copy in scales}
    found = []
    for weight in weights:
        cut = _cut(weight, grid.shape, grid.groups)
        scale = None if cut is None else beside.get(cut._replace(target=unpacked(weight.target) + suffix))
        if scale is None:
            return None
        found.append((weight, scale))
    return found


def _is_pair(weights: Sequence[Copy], scales: Sequence[Copy], grid: Grid, suffix: str) -> bool:
    """Return True for one copy of a weight with one of all its scales beside it, as nearly all are."""
    if len(weights) != 1 or len(scales) != 1:
        return False
    (weight,), (scale,) = weights, scales
    beside = unpacked(weight.target) + suffix == scale.target
    return beside and _are_alike(weight.view, weight.box, scale.view, scale.box, grid)


@functools.lru_cache(maxsize=4096)  # layers are alike
def _are_alike(view: View | None, box: Box, scale_view: View | None, scale_box: Box, grid: Grid) -> bool:
    """Return True if a weight, of which a view goes into a box, is cut as its scales are."""
    weight, scale = (
        Copy("", each, frozenset(), of, View(0, (), ())) for each, of in ((box, view), (scale_box, scale_view))
    )
    cut = _cut(weight, grid.shape, grid.groups)
    return cut is not None and cut == _cut(scale, grid.scale_shape, (1, 1))


def unpacked(name: str) -> str:
    """The parameter of a weight by the name that it has where it is not packed."""
    return name.removesuffix(PACKED)


def is_turned(copy: Copy) -> bool:
    """Return True for a matrix whose columns become rows, as some kernels have their weights."""
    view = copy.view
    if view is None or len(view.size) < 2 or len(copy.box.size) < 2:
        return False
    return view.strides[-2] == 1 < view.strides[-1] and 1 not in view.size[-2:]


def _turned(copy: Copy) -> Copy:
    """The same with rows for columns."""
    view, box = copy.view, copy.box
    if view is None or len(view.size) < 2 or len(box.size) < 2:
        return copy
    view = View(view.offset, _flipped(view.size), _flipped(view.strides))
    return copy._replace(view=view, box=Box(_flipped(box.off), _flipped(box.size)))


def _flipped(axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*axes[:-2], axes[-1], axes[-2])


def _cut(copy: Copy, shape: tuple[int, ...], groups: Groups) -> _Cut | None:
    """None if rows or columns are permuted, or if a scale group is cut."""
    view, box = copy.view, copy.box
    if view is None or len(view.size) < 2 or len(box.size) < 2 or view.size[-2:] != box.size[-2:]:
        return None
    spans = _spans(view, box.off[-2:], shape, groups)
    return spans and _Cut(copy.target, box.off[:-2], *spans)


@functools.lru_cache(maxsize=4096)  # a model has thousands of copies, and few shapes of them
def _spans(
    view: View, to: tuple[int, ...], shape: tuple[int, ...], groups: Groups
) -> tuple[tuple[tuple[int, int], ...], int, tuple[int, int, int], tuple[int, int, int]] | None:
    """The fields of a `_Cut` from ``stack`` on, of a view that begins at row and column ``to`` of the target."""
    (n, k), (height, width), strides = shape[-2:], view.size[-2:], view.strides
    if (height > 1 and strides[-2] != k) or (width > 1 and strides[-1] != 1):
        return None
    matrix, within = divmod(view.offset, n * k)
    spans = []
    for first, origin, count, group, end in zip(to, divmod(within, k), (height, width), groups, (n, k), strict=True):
        if group is None:  # one scale holds for the whole axis, and so for any part of it
            spans.append((0, 0, 1))
        elif first % group or origin % group or (count % group and origin + count != end):
            return None
        else:
            spans.append((first // group, origin // group, math.ceil(count / group)))
    leading = zip(view.size[:-2], strides[:-2], strict=True)
    stack = tuple((size, stride // (n * k)) for size, stride in leading if size > 1)
    return stack, matrix, spans[0], spans[1]


def _row_by_row(cuts: Iterable[_Cut]) -> set[_Cut]:
    return {cut._replace(rows=(cut.rows[0] + i, cut.rows[1] + i, 1)) for cut in cuts for i in range(cut.rows[2])}
