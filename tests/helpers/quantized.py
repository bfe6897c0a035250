"""Stored tensors of quantized weights, at random, and what they stand for, computed in the plainest way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.checkpoint.codings import Decoding, find_codings
from octavo.checkpoint.header import TensorInfo, read_shard
from octavo.checkpoint.packing import count
from octavo.numerics.decoding import decode

#: kind of numbers -> dtypes of the scales that they may have
SCALES = {
    "float8": (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu),
    "int8": (torch.float32, torch.bfloat16, torch.float16),
    "int4_in_int32": (torch.float32, torch.bfloat16, torch.float16),
    "int8_in_int32": (torch.bfloat16,),
    "e2m1": (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn),
}
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


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
    by_cell, zero, zero_stored, by_matrix = wide.float(), None, None, None
    if scale_dtype == torch.float8_e4m3fn:
        by_matrix = torch.rand((*lead, 1, 1), generator=generator) * 100 + 1
        by_cell = by_cell / by_matrix if decoding.divided else by_cell * by_matrix
    if zeros:
        low, high = (-8, 8) if decoding.kind == "int4_in_int32" else (-128, 128)
        zero = torch.randint(low, high, grid, generator=generator, dtype=torch.int8)
        packed = decoding.pack > 1
        zero_stored = _packed(zero.mT, -low, decoding.pack).mT.contiguous() if packed else zero
    weight = torch.empty(tuple(shape), dtype=torch.float32)
    for row in range(rows):
        for col in range(cols):
            cell = (..., row // (decoding.group_rows or rows), col // (decoding.group_cols or cols))
            number = numbers[..., row, col]
            weight[..., row, col] = (number if zero is None else number - zero[cell].float()) * by_cell[cell]
    return Stored(codes, scale, zero_stored, by_matrix, weight)


def _numbers(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers as float32, and as they are stored."""
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if kind == "e2m1":
        codes &= 15
        values = torch.where(codes > 7, -_E2M1[(codes & 7).long()], _E2M1[(codes & 7).long()])
        return values, _packed(codes, 0, 2, torch.uint8)
    if kind.endswith("_in_int32"):
        bits = int(kind[3])
        numbers = codes.int() % (1 << bits) - (1 << bits - 1)
        return numbers.float(), _packed(numbers, 1 << bits - 1, 32 // bits)
    if kind == "int8":
        return codes.view(torch.int8).float(), codes.view(torch.int8)
    dtype = (torch.float8_e4m3fn, torch.float8_e5m2)[int(torch.randint(2, (), generator=generator))]
    finite = torch.isfinite(codes.view(dtype).float())
    codes = torch.where(finite, codes, torch.zeros((), dtype=torch.uint8)).view(dtype)
    return codes.float(), codes


def _packed(numbers: Tensor, offset: int, each: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """So many numbers along the last axis in each integer, the lowest bits first; the last is filled up."""
    bits = torch.iinfo(dtype).bits // each
    words = torch.zeros((*numbers.shape[:-1], count(numbers.shape[-1], each)), dtype=torch.int64)
    for col in range(numbers.shape[-1]):
        words[..., col // each] |= (numbers[..., col].long() + offset) << bits * (col % each)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(dtype)


def _scales(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        # 0, too: a power of two that float32 holds without its hidden bit
        exponents = torch.randint(0, 250, shape, generator=generator, dtype=torch.uint8)
        return exponents.view(dtype)
    return torch.exp2(torch.rand(shape, generator=generator) * 16 - 12).to(dtype)


def decoded(folder: Path) -> dict[str, Tensor]:
    """All weights of a quantized checkpoint in one file, as float32."""
    problems: list[str] = []
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    file = folder / "model.safetensors"
    _, infos = read_shard(file, 0, problems)
    found = find_codings(folder, config, {info.name: info for info in infos}, problems)
    assert problems == []
    tensors = load_file(file)

    def held(info: TensorInfo | None, shape: tuple[int, ...]) -> Tensor | None:
        return None if info is None else tensors[info.name].reshape(shape)

    weights = {}
    for name, coding in found.by_name.items():
        whole = decode(
            coding.matrix,
            tensors[coding.codes.name].reshape(coding.codes_shape),
            tensors[coding.scale.name].reshape(coding.grid),
            coding.decoding,
            zero_point=held(coding.zero_point, coding.zero_grid),
            global_scale=held(coding.global_scale, (*coding.matrix[:-2], 1, 1)),
        )
        weights[name] = whole.mT.contiguous() if coding.transposed else whole
    return weights
