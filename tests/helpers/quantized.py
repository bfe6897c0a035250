"""Stored tensors of quantized weights, at random, and what they stand for, computed in the plainest way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.checkpoint.codings import Decoding
from octavo.checkpoint.packing import count

#: kind of numbers -> dtypes of the scales that they may have
SCALES = {
    "float8": (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu),
    "int8": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds of a weight, and the weight as float32."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    global_scale: Tensor | None
    weight: Tensor


def stored(shape: Sequence[int], decoding: Decoding, scale_dtype: torch.dtype, seed: int, *, zeros: bool) -> Stored:
    """A weight of this shape whose stored numbers are any, and whose scales are any that are good."""
    *lead, rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    grid = (*lead, count(rows, decoding.group_rows), count(cols, decoding.group_cols))
    numbers, codes = _numbers(tuple(shape), decoding.kind, generator)
    scale = _scales(grid, scale_dtype, generator)
    wide = torch.where(scale == 0, 2.0**-127, torch.exp2(scale.double() - 127)) if scale_dtype == torch.uint8 else scale
    by_cell, zero = wide.float(), None
    if zeros:
        zero = torch.randint(-128, 128, grid, generator=generator, dtype=torch.int8)
    weight = torch.empty(tuple(shape), dtype=torch.float32)
    for row in range(rows):
        for col in range(cols):
            cell = (..., row // (decoding.group_rows or rows), col // (decoding.group_cols or cols))
            number = numbers[..., row, col]
            weight[..., row, col] = (number if zero is None else number - zero[cell].float()) * by_cell[cell]
    return Stored(codes, scale, zero, None, weight)


def _numbers(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers as float32, and as they are stored."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if kind == "int8":
        return codes.view(torch.int8).float(), codes.view(torch.int8)
    dtype = (torch.float8_e4m3fn, torch.float8_e5m2)[int(torch.randint(2, (), generator=generator))]
    finite = torch.isfinite(codes.view(dtype).float())
    codes = torch.where(finite, codes, torch.zeros((), dtype=torch.uint8)).view(dtype)
    return codes.float(), codes


def _scales(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = torch.randint(0, 250, shape, generator=generator, dtype=torch.uint8)
        return exponents.view(dtype)
    return torch.exp2(torch.rand(shape, generator=generator) * 16 - 12).to(dtype)
