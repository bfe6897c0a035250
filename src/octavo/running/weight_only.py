"""Weight-only products: activations stay bf16, fp16 or fp32, and weights are widened a few rows at a time, exactly.

bf16 holds all integers to 256, so int8 is converted; what follows is about FP8.

On a CPU the widening is integer arithmetic: an e4m3 number's bits, shifted into the place of a bf16 (or fp16) number's,
are that number times a power of two. That is several times faster than torch's own conversion, and than ``_scaled_mm``,
which has no fast CPU kernel.

Scales that are one a row multiply the *output*; they are never folded into bf16 weights, which would round them. Only
scales that vary along a row (blocks, mx) are, and where a half-precision output could overflow (fp16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import nvfp4, schemes

#: rows of a weight that are widened at a time: on a CPU so few that its cache holds them
_ROWS, _ROWS_ON_DEVICE = 128, 4096
#: up to so many rows of bf16 activations are multiplied in float32 on a CPU, and so many elements of a weight at a time
_FEW = 8
_ELEMENTS = 1 << 19
#: dtypes of activations
_COMPUTE = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
#: dtype -> (left shift as a factor, mask over the shifted sign-extended byte, what the bias lacks): see `widen`
_PLACES = {
    torch.bfloat16: (1 << 4, -30736, 2.0**120),  # 0x87F0: sign, 4 exponent and 3 mantissa bits; bias 127 - 7
    torch.float16: (1 << 7, -16512, 2.0**8),  # 0xBF80; bias 15 - 7
}


def widen(q: Tensor, dtype: torch.dtype, scratch: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """float8_e4m3fn or int8 -> bf16, fp16 or fp32, exactly, for all finite values.

    Args:
        scratch: int16, at least as many elements; the result may be a view of it.
        scale: bf16 of q's shape, below 2**7; if given, the result is ``q * scale`` rounded once, and dtype is bf16.
    """
    if q.dtype == torch.int8:
        if scratch is None or dtype.itemsize != 2:
            return q.to(dtype)
        return scratch[: q.numel()].view(dtype).view(q.shape).copy_(q)
    if q.device.type != "cpu":
        return q.to(dtype)
    if dtype == torch.float32:  # by fp16, which processors make float32 of in one instruction
        half, factor = _placed(q, torch.float16, scratch)
        return half.float().mul_(factor)
    if dtype not in _PLACES:
        return q.to(dtype)
    half, factor = _placed(q, dtype, scratch)
    return half.mul_(factor if scale is None else scale * factor)


def _placed(q: Tensor, half: torch.dtype, scratch: Tensor | None) -> tuple[Tensor, float]:
    """float8_e4m3fn -> bf16 or fp16 numbers, and the power of two that makes them those of q."""
    shift, mask, factor = _PLACES[half]
    scratch = torch.empty(q.numel(), dtype=torch.int16, device=q.device) if scratch is None else scratch[: q.numel()]
    bits = scratch.view(q.shape).copy_(q.view(torch.int8))
    bits.mul_(shift).bitwise_and_(mask)  # integers are multiplied faster than shifted
    return bits.view(half), factor


def weight_only(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    scheme: str,
    parts: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias`` on any device; x may ask for a gradient.

    The product is computed in x's dtype, or on a CPU that of a few rows in float32. Scales one a row multiply the
    output in float32.

    Raises:
        TypeError: x is not bf16, fp16, fp32 or fp64 (cast to the dtype of an FP8 weight, say).
    """
    if x.dtype not in _COMPUTE:
        raise TypeError(f"activations are {x.dtype}; quantized weights are multiplied in bf16, fp16, fp32 or fp64")
    flat = x.reshape(-1, x.shape[-1])
    if schemes.get(scheme).packed:
        return _packed(flat, q, scale, scheme, parts, bias).view(*x.shape[:-1], q.shape[0])
    rows, cols = q.shape
    cells = schemes.row_scales(scale, (rows, cols), scheme, parts)  # float32 [out, column cells]
    each = schemes.get(scheme).group_cols
    by_row = each is None and x.dtype != torch.float16
    on_cpu = q.device.type == "cpu"
    step = min(rows, _ROWS if on_cpu else _ROWS_ON_DEVICE)
    differentiable = torch.is_grad_enabled() and x.requires_grad
    here = on_cpu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if here and by_row and len(flat) <= _FEW and not differentiable:
        out = _few_rows(flat, q, cells)
        return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], rows)
    # one buffer for all steps, unless each step's weight is kept for the gradient of x
    scratch = torch.empty(step * cols, dtype=torch.int16, device=q.device) if on_cpu and not differentiable else None
    # one pass instead of four, where a scale times 2**120 is still a number; bf16 can hold every scale
    # that octavo computes, and rounds one that passed through by as much as it does the weights
    in_one = here and not by_row and bool(cells.max() < 2.0**7)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        if by_row:
            weight = widen(q[start:stop], x.dtype, scratch)
        else:
            spread = cells[start:stop].to(torch.bfloat16 if in_one else torch.float32)
            spread = spread if each is None else spread.repeat_interleave(each, -1)[:, :cols]
            if in_one:
                weight = widen(q[start:stop], x.dtype, scratch, spread)
            else:
                weight = (widen(q[start:stop], x.dtype, scratch).float() * spread).to(x.dtype)
        out[:, start:stop] = F.linear(flat, weight)
    if by_row:
        out = (out.float() * cells.view(1, -1)).to(x.dtype)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], rows)


def _packed(
    x: Tensor, q: Tensor, scale: Tensor, scheme: str, parts: tuple[int, ...] | None, bias: Tensor | None
) -> Tensor:
    """`weight_only` of numbers that are packed: x [rows, in]. Widened they are exact in any dtype that has their range.

    The scale of a part of rows is a power of two.
    """
    rows = q.shape[0]
    cells = schemes.row_scales(scale, schemes.get(scheme).weight_shape(q.shape), scheme, parts)
    on_cpu = q.device.type == "cpu"
    step = min(rows, _ROWS if on_cpu else _ROWS_ON_DEVICE)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        wide = nvfp4.widen(nvfp4.Packed.of(q[some])).mul_(cells[some])
        out[:, some] = F.linear(x, wide.to(x.dtype))
    if bias is not None:
        out += bias
    return out


def _few_rows(x: Tensor, q: Tensor, cells: Tensor) -> Tensor:
    """``x[few, in] @ dequantize(q).T`` in bf16, of a scale a row: the same products, summed and scaled in float32.

    Making bf16 of a weight, which takes a multiplication in bf16, would be two fifths of the time.
    """
    rows, cols = q.shape
    step = max(1, min(rows, _ELEMENTS // max(1, cols)))
    scratch = torch.empty(step * cols, dtype=torch.int16, device=q.device)
    wide = torch.empty(step, cols, dtype=torch.float32, device=q.device)
    out = torch.empty(len(x), rows, dtype=torch.float32, device=q.device)
    x = x.float()
    factor = 1.0
    for start in range(0, rows, step):
        codes = q[start : start + step]
        numbers, factor = (codes, 1.0) if q.dtype == torch.int8 else _placed(codes, torch.float16, scratch)
        out[:, start : start + step] = x @ wide[: len(codes)].copy_(numbers).t()
    return out.mul_(cells.view(1, -1) * factor).to(torch.bfloat16)
