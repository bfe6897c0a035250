"""Chunks of sources that are quantized already: codes and the scales that belong to them, read together.

What is read is decoded a tile at a time, into float32, and then quantized as any weight. Where a scheme makes what the
source has, nothing is decoded: codes and scales are handed on.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.codings import Coding, Decoding
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece
from ..errors import WeightError
from ..numerics.decoding import ORDERED, bad_scale, decode_into, row_amax, scale_cells, zero_cells
from ..numerics.groups import count_cells
from ..numerics.lossless import unit_of
from ..numerics.recoding import recode_into, recodes
from ..numerics.schemes import Scheme
from ..planning.coded import Lay, codes_piece, lay_of
from .files import Files

#: far from any that a weight has; under it, no number of any kind makes a weight that bf16 can't hold
TOO_LARGE = 2.0**100


@dataclass(frozen=True, slots=True)
class Encoded:
    """The codes and scales of one piece. The columns of the source are the last axis of both."""

    coding: Coding
    lay: Lay
    codes: Tensor  # [..., columns / pack]
    scale: Tensor  # [..., cells], those of each row; float32
    zero_point: Tensor | None  # likewise
    shape: tuple[int, ...]  # that of the piece, or of some of its last axis
    unit: Tensor | None  # of `lossless_scale`
    start: int = 0  # where these begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, columns: slice | None) -> Encoded:
        """Some of the last axis of the piece; None: all."""
        if columns is None:
            return self
        shape = (*self.shape[:-1], columns.stop - columns.start)
        return replace(self, shape=shape, start=self.start + columns.start)

    def decode(self, box: Piece, scratch: Tensor, spare: Tensor | None = None, checked: bool = False) -> Tensor:
        """The weights of a box of the piece: float32, in scratch memory, with the axes of the piece.

        Args:
            spare: float32, as much again; spares an allocation.
            checked: whether `amax` of it has been looked at.
        """
        axis, decoding = self.lay.axis, self.coding.decoding
        codes, scale, zero, phase, head, cols = self._box(box)
        out = scratch[: box.numel].view(*codes.shape[:-1], cols)
        of_box: dict[str, Any] = {"zero_point": zero, "phase": (0, phase), "head": head}
        decode_into(out, codes, scale, _by_row(decoding), **of_box, scratch=spare, checked=checked)
        return out.squeeze(-1) if axis is None else out.movedim(-1, axis)

    def compares(self, scheme: Scheme) -> bool:
        """Return True if `amax` can be found without decoding: of FP8 whose rows are within a scale group each."""
        in_rows = self.lay.axis == len(self.shape) - 1
        return self.codes.dtype in ORDERED and scheme.group_cols is None and in_rows

    def amax(self, box: Piece, scheme: Scheme, scratch: Tensor) -> Tensor:
        """`schemes.group_amax` of a box, where `compares` says that this can be told from codes and scales."""
        codes, scale, _, phase, _, _ = self._box(box)
        found = row_amax(codes, scale, self.coding.decoding, phase=phase, scratch=scratch)
        return found if scheme.group_rows == 1 else found.amax(-2, keepdim=True)

    def recodes(self, scheme: Scheme) -> bool:
        """Return True if `recode` can make what a scheme has of it."""
        return self.compares(scheme) and recodes(self.codes.dtype, self.coding.decoding, scheme)

    def recode(self, out: Tensor, box: Piece, target: Tensor, scratch: tuple[Tensor, Tensor]) -> bool:
        """`recoding.recode_into` of a box, where `recodes` says that this can be."""
        codes, scale, _, phase, _, _ = self._box(box)
        return recode_into(out, codes, scale, target, self.coding.decoding, phase=phase, scratch=scratch)

    def _box(self, box: Piece) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        """Codes, scales and zero points of a box; where in its scale group and word it begins; how many columns."""
        axis, decoding = self.lay.axis, self.coding.decoding
        offsets, sizes = list(box.dst_off), list(box.size)
        offsets[-1] += self.start
        first, cols = (0, 1) if axis is None else (offsets.pop(axis), sizes.pop(axis))
        rows = tuple(slice(off, off + n) for off, n in zip(offsets, sizes, strict=True))
        col, pack = self.lay.col + first, decoding.pack
        words = slice(col // pack - self.lay.col // pack, -(-(col + cols) // pack) - self.lay.col // pack)
        cells, phase = _cells_of_columns(col, cols, decoding.group_cols, self.lay.col)
        zero = None if self.zero_point is None else self.zero_point[rows][..., cells]
        return self.codes[rows][..., words], self.scale[rows][..., cells], zero, phase, col % pack, cols

    def unpack(self) -> Tensor:
        """The codes as schemes have them, one an element; made of packed ones where these lie, if in a row."""
        pack = self.coding.decoding.pack
        if pack == 1:
            return self.codes
        # as `numerics.decoding` has it, each is raised by 128, which is its highest bit turned
        numbers = self.codes.contiguous().view(torch.int8).bitwise_xor_(-128)
        return numbers.narrow(-1, self.lay.col % pack, self.lay.cols)

    def grid(self, scheme: Scheme, phase: tuple[int, int]) -> Tensor:
        """The scales as those of a scheme whose groups are the same: float32 [..., row cells, column cells]."""
        group = scheme.group_rows or 1 << 62
        if not phase[0]:
            return self.scale[..., ::group, :]
        return torch.cat((self.scale[..., :1, :], self.scale[..., group - phase[0] :: group, :]), -2)


def read_encoded(files: Files, info: TensorInfo, piece: Piece, memory: Tensor) -> tuple[Encoded, int]:
    """Read the codes of a piece into the beginning of ``memory``, and its scales; returns the bytes, too.

    Raises:
        WeightError: a scale is negative, or not finite.
    """
    coding = info.coding
    assert coding is not None
    lay = lay_of(piece, coding.matrix)
    assert lay is not None
    stored = codes_piece(piece, lay, coding)
    nbytes = files.read_piece(coding.codes, stored, _view(memory))
    codes = stored.from_file_order(memory[:nbytes].view(coding.codes.dtype))
    codes = codes.unsqueeze(-1) if lay.axis is None else codes.movedim(lay.axis, -1)
    scale, zero, unit, scale_bytes = _read_scales(files, coding, lay, tuple(codes.shape[:-1]))
    return Encoded(coding, lay, codes, scale, zero, piece.size, unit), nbytes + scale_bytes


def _read_scales(
    files: Files, coding: Coding, lay: Lay, sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Scales and zero points of each row, the unit of scales, and the bytes read.

    Read are the rows of cells from the first to the last.
    """
    decoding = coding.decoding
    *_, high, wide = coding.grid
    rows = _rows_of_cells(lay, sizes, coding.matrix[-2], decoding.group_rows)
    first, stop = int(rows.min()), int(rows.max()) + 1
    cells, _ = _cells_of_columns(lay.col, lay.cols, decoding.group_cols, 0)
    stored = _read_rows(files, coding.scale, wide, (first, stop), cells)
    _check(files, coding, coding.scale, bad_scale(stored), first)
    nbytes, whole_scale, unit = stored.nbytes, None, None
    if coding.global_scale is not None:
        held = _read_rows(files, coding.global_scale, 1, (0, coding.global_scale.numel), slice(0, 1))
        _check(files, coding, coding.global_scale, bad_scale(held))
        nbytes += held.nbytes
        unit = unit_of(decoding, held) if held.numel() == 1 else None
        whole_scale = held if held.numel() == 1 else held.index_select(0, torch.arange(first, stop) // high)
    scale, zero = scale_cells(stored, decoding, whole_scale), None
    largest = float(scale.max())
    if not largest < TOO_LARGE:
        blamed = coding.scale if coding.global_scale is None else coding.global_scale
        _check(files, coding, blamed, f"weights have a scale of {largest:g} by it", first)
    if coding.zero_point is not None:
        zero, held_bytes = _read_zeros(files, coding, coding.zero_point, (first, stop), cells)
        nbytes += held_bytes
    if decoding.group_rows != 1 or lay.steps != (1,):
        scale = scale.index_select(0, rows.flatten() - first)
        zero = None if zero is None else zero.index_select(0, rows.flatten() - first)
    return scale.view(*sizes, -1), None if zero is None else zero.view(*sizes, -1), unit, nbytes


def _check(files: Files, coding: Coding, info: TensorInfo, wrong: str | None, row: int = 0) -> None:
    """Raise if something is wrong with a tensor of scales that was read from a row on."""
    if wrong is not None:
        raise WeightError(
            f"{files.name_of(info)}: tensor {info.name!r}: {wrong}{f' of its rows from {row} on' if row else ''}: no "
            f"scale that {coding.name} could be made with. Fetch the checkpoint again."
        )


def _read_zeros(
    files: Files, coding: Coding, info: TensorInfo, rows: tuple[int, int], cols: slice
) -> tuple[Tensor, int]:
    """The zero points of rows [start, stop) of cells, counted over all matrices, and the bytes read."""
    *_, high, wide = coding.grid
    words, pack = coding.zero_grid[-2], coding.decoding.pack
    found, nbytes = [], 0
    for matrix in range(rows[0] // high, -(-rows[1] // high)):
        low, stop = max(rows[0] - matrix * high, 0), min(rows[1] - matrix * high, high)
        first, last = matrix * words + low // pack, matrix * words - (-stop // pack)
        held = _read_rows(files, info, wide, (first, last), cols)
        nbytes += held.nbytes
        found.append(zero_cells(held, coding.decoding, stop - low, low % pack))
    return torch.cat(found), nbytes


def _read_rows(files: Files, info: TensorInfo, width: int, rows: tuple[int, int], cols: slice) -> Tensor:
    """Rows [start, stop) and some columns of a tensor, seen as a matrix of this width."""
    size = rows[1] - rows[0], cols.stop - cols.start
    return files.read_values(info, Piece((0, 0), size, info.name, rows[0] * width + cols.start, (width, 1)))


def _cells_of_columns(col: int, cols: int, group: int | None, first: int) -> tuple[slice, int]:
    """The column cells of a run of columns, counted from that of column ``first``, and where in a group it begins."""
    if group is None:
        return slice(0, 1), 0
    cell = col // group - first // group
    return slice(cell, cell + count_cells(cols, group, col % group)), col % group


def _rows_of_cells(lay: Lay, sizes: tuple[int, ...], height: int, group: int | None) -> Tensor:
    """The row of cells of each row, counted over all matrices of a stack."""
    rows = torch.full(sizes, lay.row, dtype=torch.int64)
    for axis, (step, n) in enumerate(zip(lay.steps, sizes, strict=True)):
        rows += (torch.arange(n) * step).view(-1, *(1,) * (len(sizes) - 1 - axis))
    if group == 1:
        return rows
    return rows // height * count_cells(height, group) + (0 if group is None else rows % height // group)


@functools.lru_cache(maxsize=256)
def _by_row(decoding: Decoding) -> Decoding:
    """The decoding of codes with the scales of each row."""
    return replace(decoding, group_rows=1)


def _view(memory: Tensor) -> memoryview:
    return memoryview(memory.numpy())  # type: ignore[arg-type]
