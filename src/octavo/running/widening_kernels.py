"""Triton kernels that widen weights to half precision.

Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

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
        scale: float32 [out, 1], or the bytes [out, ceil(in / 32)] of mxfp8's.
    """
    n, k = q.shape
    out = torch.empty(n, k, dtype=dtype, device=q.device)
    _widen_launch(n, k, scale.shape[1], scale.dtype == torch.uint8, dtype, q.dtype)(q, scale, out)
    return out


@functools.lru_cache(maxsize=4096)
def _widen_launch(n: int, k: int, cells: int, mx: bool, dtype: torch.dtype, numbers: torch.dtype) -> Launch:
    grid = (-(-n // 32), -(-k // 128), 1)
    return Launch(_widen_kernel, grid, (n, k, dtype, numbers), (n, k, cells, mx, 32), num_warps=4)
