"""Several numbers in one, as compressed-tensors has them. int8, in its format ``pack-quantized``:

    X.weight          int8 [out, in]
    X.weight_packed   int32 [out, in / 4]: each number plus 128, the first of four in the lowest byte
    X.weight_shape    int64 [2]: out, in

The bytes lie where those of ``X.weight`` would, and differ from them in the highest bit alone. NVFP4, in its format
``nvfp4-pack-quantized``:

    X.weight_packed         uint8 [out, in / 2]: the first of two in the lower half
    X.weight_scale          float8_e4m3fn [out, in / 16]
    X.weight_global_scale   float32 [1]: one by the global scale
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo

PACKED, SHAPE, GLOBAL = "_packed", "_shape", "_global_scale"
#: in which several numbers are one
DTYPES = (torch.int32, torch.uint8)
#: numbers of an int32
EACH = 4
_HIGHEST_BIT = -128


def flip(q: Tensor) -> Tensor:
    """Turn int8 numbers into the bytes of packed ones, or back, in place."""
    return q.bitwise_xor_(_HIGHEST_BIT)


def shape_tensor(shape: Sequence[int]) -> Tensor:
    """What stands beside a packed weight of this shape."""
    return torch.tensor(list(shape), dtype=torch.int64)


def unpacked(info: TensorInfo | None, name: str) -> TensorInfo | None:
    """A packed tensor in a file as the weight that is in it; None if it is none."""
    if info is None or info.dtype_name not in ("I32", "U8") or not info.shape:
        return None
    if info.dtype_name == "U8":
        return replace(info, name=name, shape=(*info.shape[:-1], info.shape[-1] * 2))
    return replace(info, name=name, dtype_name="I8", shape=(*info.shape[:-1], info.shape[-1] * EACH))
