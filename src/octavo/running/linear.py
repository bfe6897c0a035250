"""``x @ dequantize(q).T + bias``: on FP8 units where there are some (`fp8`), weight-only elsewhere.

Weight-only: activations stay bf16, fp16 or fp32, and weights are widened 128 rows at a time, exactly. On a
CPU the widening is integer arithmetic: an e4m3 number's bits, shifted into the place of a bf16 (or fp16) number's, are
that number times a power of two. That is several times faster than torch's own conversion, and than ``_scaled_mm``,
which has no fast CPU kernel.

Scales that are one a row multiply the *output*; they are never folded into bf16 weights, which would round them. Only
scales that vary along a row (blocks, mx) are, and where a half-precision output could overflow (fp16).
"""

from __future__ import annotations

from torch import Tensor

from . import fp8
from .weight_only import weight_only


def linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    scheme: str,
    parts: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias``, in x's dtype.

    On FP8 units, unless a gradient is asked or x is fp32 or fp64, `fp8.linear` says how and how exact; else
    `weight_only`.

    Raises:
        TypeError: x is not bf16, fp16, fp32 or fp64 (cast to the dtype of an FP8 weight, say).
    """
    if fp8.takes(x, q, bias):
        return fp8.linear(x, q, scale, scheme, parts or (q.shape[0],), bias)
    return weight_only(x, q, scale, scheme, parts, bias)
