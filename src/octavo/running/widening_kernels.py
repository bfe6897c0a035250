"""Triton kernels that widen weights to half precision.

Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics import nvfp4
from .launching import Launch


@triton.jit
def widened(weight, DTYPE: tl.constexpr):
    """e4m3 or int8 -> bf16 or fp16, exactly, in instructions that processors are quick at.

    The direct one from fp16 to bf16 is a quarter as fast as by way of float32, and that from integers is, too. So an
    int8 is put where an fp16 number between 1024 and 2048 has its last bits, which 1152 is subtracted from. bf16 has
    one bit too few for it: all but the sign go to a number between 128 and 256, and the sign to what is subtracted.
    """
    if weight.dtype != tl.int8:
        wide = weight.to(tl.float16).to(tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, sign, a, b, minus_1;
            mov.b32 minus_1, 0xbf80bf80;
            and.b32 low, $2, 0x7f7f7f7f;
            and.b32 sign, $2, 0x80808080;
            prmt.b32 a, low, 0x43434343, 0x4140;
            prmt.b32 b, sign, 0x43434343, 0x4140;
            fma.rn.bf16x2 $0, b, minus_1, a;
            prmt.b32 a, low, 0x43434343, 0x4342;
            prmt.b32 b, sign, 0x43434343, 0x4342;
            fma.rn.bf16x2 $1, b, minus_1, a;
            }
            """,
            "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        wide = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bits, a, less;
            mov.b32 less, 0x64806480;
            xor.b32 bits, $2, 0x80808080;
            prmt.b32 a, bits, 0x64646464, 0x4140;
            sub.f16x2 $0, a, less;
            prmt.b32 a, bits, 0x64646464, 0x4342;
            sub.f16x2 $1, a, less;
            }
            """,
            "=r,=r,r", [weight], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return wide


@triton.jit
def unpacked(codes, scales, DTYPE: tl.constexpr):
    """NVFP4, two numbers a byte -> those of even columns, and those of odd ones, times their scales and 2**-8: exactly.

    Put where a number of bf16 (fp16) has the last bits of its exponent and the first of its mantissa, one of e2m1 is
    2**-126 (2**-14) of itself. So scales are multiplied by as much, but for 2**8, with which they would be too large.

    Args:
        codes: uint8 [rows, bytes].
        scales: bits of e4m3, uint8 [rows, bytes / 8].
    """
    rows: tl.constexpr = scales.shape[0]
    groups: tl.constexpr = scales.shape[1]
    # shifted, the bits of e4m3 are those of a number of fp16, 2**-8 of itself
    factor = (scales.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32)
    place: tl.constexpr = 85070591730234615865843651857942052864.0 if tl.bfloat16 == DTYPE else 16384.0
    factor = (factor * place).to(DTYPE)
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (rows, groups, 8)), (rows, groups * 8))
    return _numbers(codes, factor, DTYPE)


@triton.jit
def _numbers(codes, factor, DTYPE: tl.constexpr):
    """As `unpacked`, with a factor for each byte. All inputs are read before an output is written."""
    if tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, first, second, zero;
            mov.b32 zero, 0x80008000;
            mov.b32 first, $5;
            mov.b32 second, $6;
            and.b32 low, $4, 0x0f0f0f0f;
            and.b32 high, $4, 0xf0f0f0f0;
            prmt.b32 a, low, 0, 0x4140;
            mul.lo.u32 a, a, 0x1040;
            and.b32 a, a, 0x81c081c0;
            fma.rn.bf16x2 $0, a, first, zero;
            prmt.b32 a, low, 0, 0x4342;
            mul.lo.u32 a, a, 0x1040;
            and.b32 a, a, 0x81c081c0;
            fma.rn.bf16x2 $1, a, second, zero;
            prmt.b32 a, high, 0, 0x4140;
            mul.lo.u32 a, a, 0x104;
            and.b32 a, a, 0x81c081c0;
            fma.rn.bf16x2 $2, a, first, zero;
            prmt.b32 a, high, 0, 0x4342;
            mul.lo.u32 a, a, 0x104;
            and.b32 a, a, 0x81c081c0;
            fma.rn.bf16x2 $3, a, second, zero;
            }
            """,
            "=r,=r,=r,=r,r,r,r", [codes, factor], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, a, b, first, second;
            mov.b32 first, $5;
            mov.b32 second, $6;
            and.b32 low, $4, 0x0f0f0f0f;
            and.b32 high, $4, 0xf0f0f0f0;
            prmt.b32 a, low, 0, 0x4140;
            shl.b32 b, a, 9;
            shl.b32 a, a, 12;
            and.b32 b, b, 0x0e000e00;
            and.b32 a, a, 0x80008000;
            or.b32 a, a, b;
            mul.rn.f16x2 $0, a, first;
            prmt.b32 a, low, 0, 0x4342;
            shl.b32 b, a, 9;
            shl.b32 a, a, 12;
            and.b32 b, b, 0x0e000e00;
            and.b32 a, a, 0x80008000;
            or.b32 a, a, b;
            mul.rn.f16x2 $1, a, second;
            prmt.b32 a, high, 0, 0x4140;
            shl.b32 b, a, 5;
            shl.b32 a, a, 8;
            and.b32 b, b, 0x0e000e00;
            and.b32 a, a, 0x80008000;
            or.b32 a, a, b;
            mul.rn.f16x2 $2, a, first;
            prmt.b32 a, high, 0, 0x4342;
            shl.b32 b, a, 5;
            shl.b32 a, a, 8;
            and.b32 b, b, 0x0e000e00;
            and.b32 a, a, 0x80008000;
            or.b32 a, a, b;
            mul.rn.f16x2 $3, a, second;
            }
            """,
            "=r,=r,=r,=r,r,r,r", [codes, factor], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def _unpack_kernel(q, scale, out, n, k, pitch, ALIGN: tl.constexpr, BR: tl.constexpr):
    """out = NVFP4's numbers by their scales and ``scale``, rounded once; 128 columns a program."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    half = tl.program_id(1) * 64 + tl.arange(0, 64)
    group = tl.program_id(1) * 8 + tl.arange(0, 8)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    in_rows = (row < n)[:, None]
    start = tl.multiple_of(row.to(tl.int64) * pitch, ALIGN)[:, None]
    codes = tl.load(q + start + half[None, :], mask=in_rows & (half < k // 2)[None, :], other=0)
    scales = tl.load(q + k // 2 + start + group[None, :], mask=in_rows & (group < k // 16)[None, :], other=0)
    low, high = unpacked(codes, scales, out.dtype.element_ty)
    wide = tl.reshape(tl.join(low.to(tl.float32), high.to(tl.float32)), (BR, 128))
    wide = wide * 256.0 * tl.load(scale + row, mask=row < n, other=0)[:, None]
    at = out + row.to(tl.int64)[:, None] * k + col[None, :]
    tl.store(at, wide.to(out.dtype.element_ty), mask=in_rows & (col < k)[None, :])


@triton.jit
def _widen_kernel(q, scale, out, n, k, cells_k, MX: tl.constexpr, BR: tl.constexpr):
    """out = q * scale, rounded once; 128 columns a program: 4 scales of MX, 2 ** (scale - 127), or one."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    group = tl.program_id(1) * 4 + tl.arange(0, 4)
    mask = (row < n)[:, None] & (col < k)[None, :]
    at = row.to(tl.int64)[:, None] * k + col[None, :]
    wide = tl.load(q + at, mask=mask, other=0.0).to(tl.float32)
    if MX:
        in_grid = (row < n)[:, None] & (group < cells_k)[None, :]
        factor = tl.load(scale + row[:, None] * cells_k + group[None, :], mask=in_grid, other=0)
        factor = tl.where(factor == 0, 0x400000, factor.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        wide = tl.reshape(tl.reshape(wide, (BR, 4, 32)) * factor[:, :, None], (BR, 128))
    else:
        wide *= tl.load(scale + row, mask=row < n, other=0)[:, None]
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=mask)


def widen(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``q[out, in]`` times its scales, rounded to ``dtype``.

    Args:
        q: float8_e4m3fn or int8; or as NVFP4 is stored.
        scale: float32 [out, 1], or the bytes [out, ceil(in / 32)] of mxfp8's.
    """
    if q.dtype == torch.uint8:
        return _unpack(q, scale, dtype)
    n, k = q.shape
    out = torch.empty(n, k, dtype=dtype, device=q.device)
    _widen_launch(n, k, scale.shape[1], scale.dtype == torch.uint8, dtype, q.dtype)(q, scale, out)
    return out


@functools.lru_cache(maxsize=4096)
def _widen_launch(n: int, k: int, cells: int, mx: bool, dtype: torch.dtype, numbers: torch.dtype) -> Launch:
    grid = (-(-n // 32), -(-k // 128), 1)
    return Launch(_widen_kernel, grid, (n, k, dtype, numbers), (n, k, cells, mx, 32), num_warps=4)


def _unpack(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    n, k = len(q), nvfp4.columns(q.shape[1])
    out = torch.empty(n, k, dtype=dtype, device=q.device)
    _unpack_launch(n, k, dtype)(q, scale, out)
    return out


@functools.lru_cache(maxsize=4096)
def _unpack_launch(n: int, k: int, dtype: torch.dtype) -> Launch:
    grid, pitch = (-(-n // 32), -(-k // 128), 1), nvfp4.stored_columns(k)
    return Launch(_unpack_kernel, grid, (n, k, dtype), (n, k, pitch, math.gcd(pitch, 16), 32), num_warps=4)
