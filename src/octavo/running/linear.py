"""``x @ dequantize(q).T + bias``: on a GPU (`fp8`), by a CPU's kernel for int8 (`int8`), or `weight_only` elsewhere."""

from __future__ import annotations

from torch import Tensor

from . import fp8, int8
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

    On a GPU, unless a gradient is asked or x is fp32 or fp64, `fp8.linear` says how and how exact; of int8 on a CPU,
    `int8.linear` says; else `weight_only`.

    Raises:
        TypeError: x is not bf16, fp16, fp32 or fp64 (cast to the dtype of an FP8 weight, say).
    """
    if fp8.takes(x, q, bias):
        return fp8.linear(x, q, scale, scheme, parts or (q.shape[0],), bias)
    if int8.takes(x, q, bias):
        return int8.linear(x, q, scale, bias)
    return weight_only(x, q, scale, scheme, parts, bias)
