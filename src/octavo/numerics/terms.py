"""The schemes, as data: how each cuts a matrix into scale groups, and what its numbers and scales are stored as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import choices
from ..elements.boxes import Box
from ..errors import RecipeError
from ..text import shown
from . import nvfp4
from .groups import Groups, count_cells

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
FP8_MAX = 448.0


class Numbers(NamedTuple):
    """The numbers that weights become."""

    name: str  # for people
    largest: float  # on which the largest magnitude of a group is put, unless its scale was rounded up


#: by their dtype, which no unquantized weight has
NUMBERS = {FP8: Numbers("FP8", FP8_MAX), torch.int8: Numbers("int8", 127.0)}
#: by the dtype in which a module holds them
HELD = {**NUMBERS, torch.uint8: Numbers("NVFP4", 6.0)}


#: where the numbers of a box go
Stored = Tensor | nvfp4.Packed


def copy_into(out: Stored, values: Stored, *, non_blocking: bool = False) -> None:
    """Copy the numbers of a box."""
    for place, part in zip(_tensors(out), _tensors(values), strict=True):
        place.copy_(part, non_blocking=non_blocking)


def in_host_memory(stored: Stored) -> bool:
    """Return True if numbers lie where a CPU can write them."""
    return all(tensor.device.type == "cpu" for tensor in _tensors(stored))


def _tensors(stored: Stored) -> tuple[Tensor, ...]:
    return stored if isinstance(stored, nvfp4.Packed) else (stored,)


def region(stored: Stored, box: Box) -> Stored:
    """The view of what is stored that shows a box of it."""
    return stored.box(*box) if isinstance(stored, nvfp4.Packed) else box.region(stored)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is cut into scale groups, and what their scales look like."""

    name: str
    group_rows: int | None  # rows of a scale group; None: all
    group_cols: int | None  # columns of a scale group; None: all
    power_of_two: bool  # e8m0 scales; else float32 numbers that bf16 can hold
    dtype: torch.dtype = FP8  # of the numbers

    @property
    def numbers(self) -> Numbers:
        """What is known of numbers of this dtype."""
        return HELD[self.dtype]

    @property
    def packed(self) -> bool:
        """Return True if weights are stored as `nvfp4` says, and the scale is that of the matrix."""
        return self.dtype == torch.uint8

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored."""
        return E8M0 if self.power_of_two else torch.float32

    @property
    def by_row(self) -> bool:
        """Return True if each row is a group: float32 scales ``[..., out, 1]`` are broadcast as they are."""
        return self.group_rows == 1 and self.group_cols is None and not self.power_of_two

    @property
    def groups(self) -> Groups:
        """Rows and columns of a scale group; None: all."""
        return self.group_rows, self.group_cols

    @property
    def align(self) -> int:
        """Boxes begin and end at multiples of so many columns."""
        return nvfp4.GROUP if self.packed else 1

    def unfit(self, cols: int) -> str | None:
        """Why a matrix with so many columns can't be quantized; None if it can."""
        return f"{cols:,} columns, no multiple of {self.align}" if cols % self.align else None

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in which weights of a shape [..., out, in] are stored."""
        return (*shape[:-1], nvfp4.stored_columns(shape[-1])) if self.packed else tuple(shape)

    def weight_shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The shape of the weights that are stored in a shape: the inverse of `stored_shape`."""
        return (*stored[:-1], nvfp4.columns(stored[-1])) if self.packed else tuple(stored)

    def numbers_in(self, stored: Tensor) -> Stored:
        """What is stored, as boxes can be taken of it."""
        return nvfp4.Packed.of(stored) if self.packed else stored

    def scratch(self, memory: Tensor, shape: Sequence[int]) -> Stored:
        """Where the numbers of a box of this shape go, in memory of bytes."""
        stored = self.stored_shape(shape)
        return self.numbers_in(memory[: math.prod(stored)].view(self.dtype).view(stored))

    def cells(self, rows: int, cols: int) -> tuple[int, int]:
        """The number of scale groups along rows and columns of a matrix."""
        return count_cells(rows, self.group_rows), count_cells(cols, self.group_cols)

    def scale_shape(self, shape: Sequence[int], parts: Sequence[int] | None = None) -> tuple[int, ...]:
        """Shape of the scale of ``weight[..., out, in]``, whose rows are quantized in ``parts`` (default: one).

        A lone matrix with a lone group has the scale shape ``[]``.
        """
        *lead, rows, cols = shape
        cell_rows = sum(self.cells(part, cols)[0] for part in (parts or (rows,)))
        cell_cols = self.cells(rows, cols)[1]
        if self.group_rows is None and not lead and cell_rows == 1:
            return ()
        return (*lead, cell_rows, cell_cols)


SCHEMES = {
    name: Scheme(name, terms.group_rows, terms.group_cols, terms.power_of_two, getattr(torch, terms.dtype))
    for name, terms in choices.SCHEMES.items()
}


def get(name: str | Scheme) -> Scheme:
    """The scheme called ``name``; a `RecipeError` that lists them otherwise."""
    if isinstance(name, Scheme):
        return name
    if not isinstance(name, str) or name not in SCHEMES:
        hint = " (None is for no quantization)" if name in ("none", "bf16") else ""
        raise RecipeError(f"unknown scheme {shown(name)}; known: {', '.join(SCHEMES)}{hint}")
    return SCHEMES[name]
