"""Products with int8 weights, a scale a row, on a CPU: torch's own kernel, which reads half the bytes of bf16.

It multiplies activations in bf16 with integers, sums in float32, scales, and rounds once: more exactly than a product
with dequantized weights, which have been rounded before. With few rows, where a product takes as long as reading the
weights does, it is faster than bf16. With many it is slower than the units that some processors have for bf16: there,
weights are widened (`weight_only`), as they are for fp16 and fp32, which the kernel takes slowly, and for gradients of
either mode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gradients

#: up to so many rows the kernel is faster than units for bf16, weights widened for them
_FEW = 8
#: what its loops step by; in between it reads beyond the end of a row
_STEP = 64
#: whether this processor multiplies bf16 itself
_HAS_UNITS = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def takes(x: Tensor, q: Tensor, bias: Tensor | None = None) -> bool:
    """Return True if `linear` takes these operands, and is faster than widening."""
    if q.dtype != torch.int8 or x.dtype != torch.bfloat16 or q.device.type != "cpu":
        return False
    if q.shape[1] % _STEP or not q.is_contiguous() or not x.numel():
        return False
    if gradients.are_asked(x, bias):
        return False
    return not _HAS_UNITS or x.numel() <= _FEW * q.shape[1]


def linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias`` in bf16, given a scale ``[out, 1]``.

    The kernel wants it in bf16, which holds those that octavo computes. One that passed through is rounded to it, by as
    much at most as the result is.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch._weight_int8pack_mm(flat, q, scale.view(-1).bfloat16())
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], q.shape[0])
