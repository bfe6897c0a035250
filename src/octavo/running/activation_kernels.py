"""Triton kernels that make activations FP8 when they come.

Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, power_of_two


@triton.jit
def _quantize_rows_kernel(x, q, scale, k, BLOCK: tl.constexpr):
    """One scale a row: float32 amax / 448, or 1."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    values = tl.load(x + row * k + col, mask=col < k, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(values), 0)
    factor = tl.where(amax > 0, amax / 448.0, 1.0)
    tl.store(scale + row, factor)
    tl.store(q + row * k + col, (values / factor).to(tl.float8e4nv), mask=col < k)


@triton.jit(do_not_specialize=["m", "padded"])
def _quantize_groups_kernel(x, q, scale, m, padded, k, BR: tl.constexpr):
    """One scale for 128 columns of a row, stored [k / 128, padded]; rows from m to padded become zeros."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row.to(tl.int64)[:, None] * k + col[None, :]
    values = tl.load(x + at, mask=(row < m)[:, None] & (col < k)[None, :], other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(values), 1)
    factor = tl.where(amax > 0, amax / 448.0, 1.0)
    tl.store(scale + tl.program_id(1) * padded + row, factor, mask=row < padded)
    quantized = (values / factor[:, None]).to(tl.float8e4nv)
    tl.store(q + at, quantized, mask=(row < padded)[:, None] & (col < k)[None, :])


class Rows:
    """Makes FP8 of so many rows, one scale a row: see `quantize_rows`."""

    __slots__ = ("_launch", "_shape")

    stride = 1

    def __init__(self, rows: int, k: int, dtype: torch.dtype) -> None:
        self._shape, block = (rows, k), power_of_two(k)
        warps = min(max(block // 1024, 1), 16)
        self._launch = Launch(_quantize_rows_kernel, (rows, 1, 1), (k, dtype), (k, block), num_warps=warps)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.empty(self._shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(self._shape[0], 1, dtype=torch.float32, device=x.device)
        self._launch(x, q, scale)
        return q, scale


class Groups:
    """Makes FP8 of so many rows, one scale for 128 columns of a row: see `quantize_groups`."""

    __slots__ = ("_grid", "_launch", "_shape", "stride")

    def __init__(self, rows: int, k: int, dtype: torch.dtype) -> None:
        self.stride = padded = -(-rows // 4) * 4
        self._shape, self._grid = (padded, k), (-(-k // 128), padded)
        grid = (-(-padded // 32), -(-k // 128), 1)
        self._launch = Launch(_quantize_groups_kernel, grid, (k, dtype), (rows, padded, k, 32), num_warps=4)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.empty(self._shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(self._grid, dtype=torch.float32, device=x.device)
        self._launch(x, q, scale)
        return q, scale


each_row = functools.lru_cache(maxsize=4096)(Rows)
groups = functools.lru_cache(maxsize=4096)(Groups)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> float8_e4m3fn [rows, k] and float32 [rows, 1], one scale a row."""
    return each_row(x.numel() // x.shape[-1], x.shape[-1], x.dtype)(x)


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> float8_e4m3fn [padded, k] and float32 [ceil(k / 128), padded], one scale for 128 columns of a row.

    Rows are padded with zeros to a multiple of 4: cuBLAS wants scales whose columns begin at 16 bytes.
    """
    return groups(x.numel() // x.shape[-1], x.shape[-1], x.dtype)(x)
