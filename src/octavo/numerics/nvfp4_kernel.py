"""A Triton kernel that quantizes to NVFP4 on a GPU: the bytes that `nvfp4` defines, in one launch.

Imported only where Triton is installed. Every operation on floats is rounded once, to nearest: divisions are asked for
as such, since Triton's own are approximate, and no product is added to anything.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: groups that a program quantizes, and its warps
_BLOCK, _WARPS = 128, 4
#: how the weights of a box lie: columns beside each other, and rows at multiples of 16; rows beside each other; else
_COLUMNS, _ROWS, _ANYHOW = 0, 1, 2


@triton.jit(
    do_not_specialize=[
        "scale", "errors", "codes", "scales", "rows", "groups", "weight_lead", "weight_row", "weight_col",
        "scale_lead", "codes_lead", "codes_row", "scales_lead", "scales_row",
    ]
)  # fmt: skip
def _quantize_kernel(
    weight, scale, errors, codes, scales,
    rows, groups, weight_lead, weight_row, weight_col, scale_lead, codes_lead, codes_row, scales_lead, scales_row,
    LIES: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Groups of 16 columns of a matrix [rows, 16 * groups]; all names are those of `nvfp4`."""
    if LIES == 1:  # _ROWS: of one column of groups, rows that lie beside each other
        each = tl.cdiv(rows, BLOCK)
        program = tl.program_id(0) % (each * groups)
        lead = (tl.program_id(0) // (each * groups)).to(tl.int64)
        row = (program % each * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        group = tl.full((BLOCK,), program // each, tl.int64)
        weight_at = row
    else:
        each = tl.cdiv(rows * groups, BLOCK)
        lead = (tl.program_id(0) // each).to(tl.int64)
        index = tl.program_id(0) % each * BLOCK + tl.arange(0, BLOCK)
        row = (index // groups).to(tl.int64)
        group = (index % groups).to(tl.int64)
        weight_at = row * weight_row
    mask = row < rows
    column = tl.arange(0, 16)
    if LIES == 0:  # _COLUMNS
        start = tl.multiple_of(weight_at + lead * weight_lead + group * 16, 16)
        at = weight + start[:, None] + column[None, :]
    else:
        at = weight + (weight_at + lead * weight_lead)[:, None]
        at += (group[:, None] * 16 + column[None, :]) * weight_col
    wide = tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32)
    whole = tl.load(scale + lead * scale_lead)

    magnitude = tl.abs(wide)
    amax = tl.div_rn(tl.max(magnitude, 1), tl.broadcast_to(whole, (BLOCK,)))
    bits = to_e4m3(tl.div_rn(amax, tl.full((BLOCK,), 6.0, tl.float32)))
    bits = tl.where(amax == 0, 0x38, tl.maximum(bits, 1))
    if SEARCH:
        first = _from_e4m3(bits) * whole
        step = tl.div_rn(tl.full((BLOCK,), 1.0, tl.float32), first) * 28.0
        part = magnitude * step[:, None]
        line = tl.where(bits < 8, bits, (bits & 7) + 8) * 256
        # infinite where all weights are all but zero: then nothing is to choose
        entry = tl.where(part < 256.0, line[:, None] + part.to(tl.int32), 0)
        total = tl.sum(tl.load(errors + entry), 1)
        best = (total & 0xFFFF).to(tl.int32) * 4
        best = tl.minimum(best, ((total >> 16) & 0xFFFF).to(tl.int32) * 4 + 1)
        best = tl.minimum(best, ((total >> 32) & 0xFFFF).to(tl.int32) * 4 + 2)
        best = tl.minimum(best, ((total >> 48) & 0xFFFF).to(tl.int32) * 4 + 3)
        number = best & 3
        bits += number + (number & 2)  # 0, 1, 4 or 5 further on
    bits = tl.minimum(bits, tl.where(whole < 1329227995784915872903807060280344576.0, 0x7F, 0x62))  # 2**120: at most 40
    tl.store(scales + lead * scales_lead + row * scales_row + group, bits.to(tl.uint8), mask=mask)

    quarter = _from_e4m3(bits) * whole * 0.25
    found = tl.div_rn(wide, tl.broadcast_to(quarter[:, None], (BLOCK, 16)))
    size = tl.abs(found)
    code = (size > 1).to(tl.int32) + (size >= 3).to(tl.int32) + (size > 5).to(tl.int32) + (size >= 7).to(tl.int32)
    code += (size > 10).to(tl.int32) + (size >= 14).to(tl.int32) + (size > 20).to(tl.int32)
    code |= tl.where(found < 0, 8, 0)
    low, high = tl.split(tl.reshape(code, (BLOCK, 8, 2)))
    to = codes + (lead * codes_lead + row * codes_row + group * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(to, (low | (high << 4)).to(tl.uint8), mask=mask[:, None])


@triton.jit
def to_e4m3(value):
    """The bits of the nearest number of e4m3, of two the even one; 0 <= value <= 448, float32."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # beside 2**14, the last bit of a float32 is 2**-9
    below = (value + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(value < 0.015625, below, normal)


@triton.jit
def _from_e4m3(bits):
    """The number that bits of e4m3 stand for, float32."""
    exponent = tl.maximum(bits >> 3, 1)
    mantissa = tl.where(bits < 8, bits, (bits & 7) + 8)
    return mantissa.to(tl.float32) * ((exponent + 117) << 23).to(tl.float32, bitcast=True)


def quantize_into(
    codes: Tensor, scales: Tensor, weight: Tensor, scale: Tensor, errors: Tensor, *, search: bool
) -> None:
    """Write numbers and scales of a box of whole groups of columns, on the device where all tensors are.

    No views are made where a kernel does it: what the launching thread does is what takes time.

    Args:
        codes: uint8 [..., out, in / 2], and
        scales: float8_e4m3fn [..., out, in / 16], both with columns beside each other.
        weight: bf16, fp16 or fp32 [..., out, in]; any strides.
        scale: float32 [..., 1, 1], or of one element for all.
        errors: the table of `nvfp4`.
    """
    if weight.ndim > 3:
        for matrices in zip(codes, scales, weight, scale.expand(*weight.shape[:-2], 1, 1), strict=True):
            quantize_into(*matrices, errors, search=search)
        return
    device = weight.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            quantize_into(codes, scales, weight, scale, errors, search=search)
        return
    rows, groups = scales.shape[-2:]
    count, lead, scale_lead, codes_lead, scales_lead = 1, 0, 0, 0, 0
    if weight.ndim == 3:
        count, lead, codes_lead, scales_lead = weight.shape[0], weight.stride(0), codes.stride(0), scales.stride(0)
        scale_lead = 0 if scale.numel() == 1 else scale.stride(0)
    row, col = weight.stride()[-2:]
    beside = _ANYHOW if row % 16 or lead % 16 else _COLUMNS
    lies = beside if col == 1 else _ROWS if row == 1 else _ANYHOW
    each = -(-rows // _BLOCK) * groups if lies == _ROWS else -(-rows * groups // _BLOCK)
    if not count * each:
        return
    _quantize_kernel[(count * each, 1, 1)](
        weight, scale, errors, codes, scales.view(torch.uint8),
        rows, groups, lead, row, col, scale_lead, codes_lead, codes.stride(-2), scales_lead, scales.stride(-2),
        lies, search, _BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
