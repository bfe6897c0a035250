"""What a plan needs to know of sources that are quantized already: where codes and scales lie, and what may stay."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..checkpoint import dtypes
from ..checkpoint.codings import Coding, Decoding
from ..checkpoint.header import TensorInfo
from ..choices import AUTO, DEFAULT_SCHEME, PASSING
from ..elements.pieces import Piece
from ..numerics import schemes
from ..numerics.groups import count_cells
from ..numerics.lossless import keeps
from ..numerics.scale_grid import cuts_no_group
from ..numerics.schemes import Scheme
from .recipe import Recipe

if TYPE_CHECKING:
    from .placement import Placement


#: of all schemes the nearest to int8 in other groups
_INTEGERS = "int8_channel"


class Lay(NamedTuple):
    """Where a piece lies in its source, seen as a matrix: the rows of all matrices of a stack below each other."""

    row: int  # the first
    steps: tuple[int, ...]  # from row to row, along each axis of the piece but that of the columns
    col: int  # the first
    cols: int  # so many, one after another
    axis: int | None  # of the piece, along which they lie; None: it has one column, and no axis of it

    def rows_axes(self, size: Sequence[int]) -> tuple[int, ...]:
        """The sizes of a piece along all axes but that of the columns."""
        return tuple(n for axis, n in enumerate(size) if axis != self.axis)


def lay_of(piece: Piece, shape: Sequence[int]) -> Lay | None:
    """How a piece lies in a source of this shape; None where its columns are no run of those of the source."""
    width = shape[-1]
    row, col = divmod(piece.src_off, width) if width else (0, 0)
    axis, cols, steps = None, 1, []
    for number, (n, stride) in enumerate(zip(piece.size, piece.src_strides, strict=True)):
        if n > 1 and stride % width:
            if stride != 1 or axis is not None or col + n > width:
                return None
            axis, cols = number, n
        steps.append(stride // width)
    if axis is None:  # of a single column, any axis may be its own
        axis = next((number for number in reversed(range(len(steps))) if piece.size[number] == 1), None)
    if axis is not None:
        del steps[axis]
    return Lay(row, tuple(steps), col, cols, axis)


def stored_piece(piece: Piece, coding: Coding) -> Piece | None:
    """A piece of a weight as the same of its `Coding.matrix`; None where that is none."""
    if not coding.transposed:
        return piece
    *_, rows, cols = coding.shape
    matrix, within = divmod(piece.src_off, rows * cols)
    row, col = divmod(within, cols)
    last_row, last_col, strides = row, col, []
    for n, stride in zip(piece.size, piece.src_strides, strict=True):
        if n > 1 and stride % (rows * cols):
            if stride % cols == 0:
                last_row, stride = last_row + (n - 1) * (stride // cols), stride // cols
            else:
                last_col, stride = last_col + (n - 1) * stride, stride * rows
        strides.append(stride)
    if last_row >= rows or last_col >= cols:
        return None
    return piece._replace(src_off=matrix * rows * cols + col * rows + row, src_strides=tuple(strides))


def codes_piece(piece: Piece, lay: Lay, coding: Coding) -> Piece:
    """The same elements in the tensor of codes, which may hold several in one of its own."""
    pack, width = coding.decoding.pack, coding.codes_shape[-1]
    first, stop = lay.col // pack, -(-(lay.col + lay.cols) // pack)
    strides = list(lay.steps)
    strides = [step * width for step in strides]
    size = list(piece.size)
    if lay.axis is not None:
        strides.insert(lay.axis, 1)
        size[lay.axis] = stop - first
    return Piece(piece.dst_off, tuple(size), coding.codes.name, lay.row * width + first, tuple(strides))


class Cells(NamedTuple):
    """The scales of a piece as a box of the tensor that holds them."""

    piece: Piece  # [..., row cells, column cells]; axes in front are those of the piece, less that of its columns
    phase: int  # the row within its scale group at which the first cell begins


def cells_piece(piece: Piece, lay: Lay, coding: Coding) -> Cells | None:
    """The scales of a piece; None where they are no box: rows of several matrices one after another, say."""
    sizes = lay.rows_axes(piece.size)
    if not sizes or not math.prod(sizes):
        return None
    *steps, step = lay.steps
    *lead, rows = sizes
    *_, high, wide = coding.grid
    height, group, group_cols = coding.matrix[-2], coding.decoding.group_rows, coding.decoding.group_cols
    matrix, row = divmod(lay.row, height)
    if group == 1:
        first, phase, strides = lay.row, 0, [*(each * wide for each in steps), step * wide]
    else:
        within = row + rows <= height and (step == 1 or rows == 1)
        if not within or any(each % height for each, n in zip(steps, lead, strict=True) if n > 1):
            return None
        cell, phase = divmod(row, group or height) if group else (0, 0)
        first, rows = matrix * high + cell, count_cells(rows, group, phase)
        strides = [*(each // height * high * wide for each in steps), wide]
    cell, col = divmod(lay.col, group_cols) if group_cols else (0, 0)
    size = (*lead, rows, count_cells(lay.cols, group_cols, col))
    return Cells(Piece((0,) * len(size), size, coding.scale.name, first * wide + cell, (*strides, 1)), phase)


def decoded_there(pieces: Iterable[Piece], codings: Mapping[str, Coding]) -> bool:
    """Return True if an accelerator can decode all of these from what is stored, sent as it is.

    Not zero points, which are packed along rows, nor matrices of a stack that have a global scale each.
    """
    for piece in pieces:
        coding = codings.get(piece.src_name)
        if coding is None or not piece.numel:
            continue
        if coding.zero_point is not None or (coding.global_scale is not None and coding.global_scale.numel != 1):
            return False
        how = (piece.size, piece.src_off, piece.src_strides, coding.shape, coding.decoding, coding.transposed)
        if lays(*how)[2] is None:  # of all parts of a piece scales are a box if those of the piece are
            return False
    return True


@functools.lru_cache(maxsize=4096)
def lays(
    size: tuple[int, ...], off: int, strides: tuple[int, ...], shape: tuple[int, ...], decoding: Decoding, other: bool
) -> tuple[Lay | None, Piece, Cells | None]:
    """How a piece lies in a source (`transposed`: other), its codes and its scales, of no names.

    A model has thousands of pieces, of few kinds.
    """
    none = TensorInfo("", "F32", (), 0, 0, 0)
    coding, piece = Coding("", shape, decoding, none, none, transposed=other), Piece((), size, "", off, strides)
    lay = lay_of(piece, coding.matrix)
    if lay is None:
        return None, piece, None
    return lay, codes_piece(piece, lay, coding), cells_piece(piece, lay, coding)


def stored_nbytes(piece: Piece, coding: Coding | None, itemsize: int) -> int:
    """Bytes of a piece in its file: of codes, or of elements of so many bytes."""
    if coding is None:
        return piece.numel * itemsize
    return piece.numel * dtypes.BITS[coding.codes.dtype_name] // (8 * coding.decoding.pack)


def memory_of(coding: Coding) -> int:
    """Bytes that reading an element takes at most: of its codes, and of scales, as stored and for each row."""
    width = coding.matrix[-1] or 1
    group = min(coding.decoding.group_cols or width, width)
    cell = dtypes.BITS[coding.scale.dtype_name] // 8 + 8 + (12 if coding.zero_point is not None else 0)
    codes = dtypes.BITS[coding.codes.dtype_name] / (8 * coding.decoding.pack)
    return math.ceil(codes + cell / group)


def lay_problems(name: str, pieces: Iterable[Piece], infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Why a parameter can't be made of sources that are quantized already."""
    for piece in pieces:
        info = infos[piece.src_name]
        if info.coding is None or not piece.numel:
            continue
        stored = stored_piece(piece, info.coding)
        if stored is None or lay_of(stored, info.coding.matrix) is None:
            yield f"{name}: takes columns of {info.name} that don't follow each other, which octavo can't decode"
            return


def requantized(placements: Iterable[Placement], offered: Collection[str] = tuple(schemes.SCHEMES)) -> Iterator[str]:
    """Remarks on weights that a scheme rounds a second time, and on one that keeps their bytes, of those offered."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for placement in placements:
        if not placement.codings or placement.scheme is None or placement.passed:
            continue
        if placement.lossless and all(coding.decoding.powers for _, coding in placement.codings):
            continue  # of NVFP4, scales keep most numbers, and not all
        coding = placement.codings[0][1]
        keeping = _keeping(coding)
        if keeping in offered and keeping != placement.scheme:
            counts[str(coding), placement.scheme, f", where {keeping} would keep their bytes"] += 1
        elif keeping != placement.scheme:
            integers = coding.decoding.kind in ("int8", "int8_in_int32") and _INTEGERS in offered
            nearer = _INTEGERS if integers else placement.scheme
            more = "" if nearer == placement.scheme else f"; {nearer} is nearer to them"
            counts[str(coding), placement.scheme, f", as any would{more}"] += 1
    for (said, scheme, more), count in counts.items():
        yield f"{count:,} tensors are {said} already, and {scheme} rounds them a second time{more}"


def settled(
    recipe: Recipe, infos: Iterable[TensorInfo], offered: Collection[str] = PASSING
) -> tuple[Recipe, str | None]:
    """The recipe with a scheme in the place of `AUTO`, and a remark where that is not the usual one.

    It is the scheme that keeps the bytes of most weights that are quantized already; one for all, since those of layers
    that readers fuse have to agree.

    Args:
        offered: schemes that may be chosen, beside the default.
    """
    if recipe.scheme != AUTO:
        return recipe, None
    counts: Counter[str] = Counter()
    said: dict[str, str] = {}
    for info in infos:
        if info.coding is not None:
            keeping = _keeping(info.coding)
            scheme = keeping if keeping is not None and keeping in offered else DEFAULT_SCHEME
            counts[scheme] += info.numel
            said.setdefault(scheme, str(info.coding))
    scheme = max(counts, key=lambda name: counts[name], default=DEFAULT_SCHEME)
    remark = None
    if scheme != DEFAULT_SCHEME:
        remark = (
            f"no scheme is named, and the source is {said[scheme]}: it stays so ({scheme}), since any other scheme "
            f"would round a second time; {DEFAULT_SCHEME} has to be asked for"
        )
    return Recipe(scheme, recipe.targets, recipe.ignore), remark


def _keeping(coding: Coding) -> str | None:
    """The scheme that keeps the bytes of a source."""
    return next((name for name, scheme in schemes.SCHEMES.items() if coding_is(coding, scheme)), None)


def passes(
    pieces: Sequence[Piece], parts: Sequence[int], cols: int, scheme: Scheme, codings: Mapping[str, Coding]
) -> bool:
    """Return True if codes and scales of all sources are those of the scheme, groups and all: nothing is computed."""
    return all(_passes(piece, parts, cols, scheme, codings.get(piece.src_name)) for piece in pieces)


def keeps_all(
    pieces: Sequence[Piece], parts: Sequence[int], cols: int, scheme: Scheme, codings: Mapping[str, Coding]
) -> bool:
    """Return True if scales are chosen by which weights of all sources stay what they are, as far as they can.

    Those of a source with a global scale depend on it, so no group may have weights of two sources.
    """
    if not pieces or any(piece.src_name not in codings for piece in pieces):
        return False
    for piece in pieces:
        coding = codings[piece.src_name]
        if not keeps(coding.decoding, scheme):
            return False
        alone = piece.size[-1] == cols and any(
            piece.box.off[-2] == start and piece.size[-2] == rows for start, rows in _starts(parts)
        )
        if coding.global_scale is not None and not (alone and coding.global_scale.numel == 1):
            return False
    return True


def _passes(piece: Piece, parts: Sequence[int], cols: int, scheme: Scheme, coding: Coding | None) -> bool:
    if coding is None or not coding_is(coding, scheme) or not piece.numel:
        return False
    lay, last = lay_of(piece, coding.matrix), len(piece.size) - 1
    if lay is None or lay.axis != last or (piece.size[last - 1] > 1 and lay.steps[-1] != 1):
        return False
    rows = coding.matrix[-2]
    firsts = [lay.row, *(step for step, n in zip(lay.steps[:-1], piece.size, strict=False) if n > 1)]
    if scheme.group_rows is None:
        aligned = all(first % rows == 0 for first in firsts)
    else:  # where matrices of a stack end within a group, the next begin with a new one
        aligned = all(first % rows % scheme.group_rows == 0 for first in firsts)
        aligned &= all(step % rows == 0 or rows % scheme.group_rows == 0 for step in firsts[1:])
    if not aligned or (scheme.group_cols is not None and lay.col % scheme.group_cols):
        return False
    first = piece.dst_off[-2]
    start = next(at for at, n in _starts(parts) if at <= first < at + n)
    stop = start + dict(_starts(parts))[start]
    return piece.dst_end[-2] <= stop and cuts_no_group(piece.box, scheme, (start, stop), cols)


def _starts(parts: Sequence[int]) -> Iterable[tuple[int, int]]:
    start = 0
    for rows in parts:
        yield start, rows
        start += rows


def coding_is(coding: Coding, scheme: Scheme) -> bool:
    """Return True if what a scheme makes is stored as this: its numbers, and its groups."""
    decoding = coding.decoding
    groups = decoding.group_rows, decoding.group_cols
    alone = not scheme.packed and coding.zero_point is None and coding.global_scale is None and not coding.transposed
    by_power = coding.scale.dtype_name in ("F8_E8M0", "U8")
    stored = torch.int8 if decoding.kind == "int8_in_int32" else coding.codes.dtype if decoding.pack == 1 else None
    return stored == scheme.dtype and groups == scheme.groups and alone and (by_power or not scheme.power_of_two)
