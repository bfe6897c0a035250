"""Products by torch's own FP8 kernels (cuBLAS, CUTLASS), of activations that are made FP8 when they come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import schemes
from .available import kernels


def takes(
    shape: tuple[int, int], scheme: str, parts: Sequence[int], dtype: torch.dtype, capability: tuple[int, int]
) -> bool:
    """Return True if `product` takes a weight of this shape, and activations of this dtype."""
    found = schemes.get(scheme)
    if found.dtype != schemes.FP8 or found.power_of_two or any(side % 16 for side in shape):
        return False
    if scheme == "fp8_block":
        # cuBLAS knows 1x128 by 128x128 on Hopper only, and one regular grid of blocks
        return hasattr(F, "scaled_mm") and capability[0] == 9 and not any(part % 128 for part in parts[:-1])
    return hasattr(F, "scaled_mm") or dtype == torch.bfloat16


def product(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, *, by_block: bool, parts: Sequence[int]
) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias``, in x's dtype."""
    n, k = q.shape
    fused = bias if bias is not None and bias.dtype == x.dtype else None
    quantized, x_scale = (quantize_groups if by_block else quantize_rows)(x)
    if x.is_meta:  # nothing else is compiled, and torch would import half a second's worth of modules
        return x.new_empty(*x.shape[:-1], n)
    if by_block:
        out = _scaled_mm(quantized, q.t(), x_scale.t(), _in_columns(scale), fused, x.dtype, by_block)
        rows = x.numel() // k
        out = out if len(out) == rows else out[:rows]
    else:
        out = _scaled_mm(quantized, q.t(), x_scale, row_of_scales(scale, parts), fused, x.dtype, by_block)
    if bias is not None and fused is None:
        out = out + bias
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def _scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, by_block: bool
) -> Tensor:
    # what is public converts its arguments in Python, microseconds where these count, and takes more of them
    padded = by_block and len(b_scale) > -(-len(b) // 128)
    if (dtype == torch.bfloat16 and not padded) or not hasattr(F, "scaled_mm"):
        return torch._scaled_mm(a, b, a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=not by_block)
    kinds = F.ScalingType
    recipes = (kinds.BlockWise1x128, kinds.BlockWise128x128) if by_block else (kinds.RowWise, kinds.RowWise)
    return F.scaled_mm(
        a, b, a_scale, recipes[0], b_scale, recipes[1], bias=bias, output_dtype=dtype, use_fast_accum=not by_block
    )


def _in_columns(scale: Tensor) -> Tensor:
    """Scales of blocks [ceil(out / 128), ceil(in / 128)] -> the other way round, columns padded to whole 16 bytes."""
    return (F.pad(scale, (0, -scale.shape[1] % 4)) if scale.shape[1] % 4 else scale).t()


def row_of_scales(scale: Tensor, parts: Sequence[int]) -> Tensor:
    """Stored scales of fp8_channel or fp8_tensor -> float32 [1, out], one for each row of the weight."""
    rows = sum(parts)
    if scale.numel() == rows:
        return scale.view(1, rows)
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(1, rows).contiguous()
    return torch.cat([each.expand(1, part) for each, part in zip(scale, parts, strict=True)], -1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> float8_e4m3fn [rows, k], float32 [rows, 1]."""
    compiled = kernels()
    if compiled is not None:
        return compiled.quantize_rows(x)  # type: ignore[no-any-return]
    values = x.reshape(-1, x.shape[-1]).float()
    scale = values.abs().amax(-1, keepdim=True) / schemes.FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).to(schemes.FP8), scale


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., k] -> float8_e4m3fn [padded rows, k], float32 [ceil(k / 128), padded rows]; padded to a multiple of 4."""
    compiled = kernels()
    if compiled is not None:
        return compiled.quantize_groups(x)  # type: ignore[no-any-return]
    flat = x.reshape(-1, x.shape[-1])
    rows, k = flat.shape
    values = F.pad(flat.float(), (0, -k % 128, 0, -rows % 4))
    values = values.view(values.shape[0], -1, 128)
    scale = values.abs().amax(-1) / schemes.FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    quantized = (values / scale[..., None]).flatten(-2)[:, :k].to(schemes.FP8)
    return quantized, scale.t().contiguous()
