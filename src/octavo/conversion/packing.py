"""int8, four numbers to an int32, as compressed-tensors' format ``pack-quantized`` has it.

    X.weight          int8 [out, in]
    X.weight_packed   int32 [out, in / 4]: each number plus 128, the first of four in the lowest byte
    X.weight_shape    int64 [2]: out, in

The bytes lie where those of ``X.weight`` would, and differ from them in the highest bit alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.header import TensorInfo

PACKED, SHAPE = "_packed", "_shape"
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
    if info is None or info.dtype_name != "I32" or not info.shape:
        return None
    return replace(info, name=name, dtype_name="I8", shape=(*info.shape[:-1], info.shape[-1] * EACH))
