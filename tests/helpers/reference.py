"""The numeric definition once more, as plainly as possible, sharing no line with ``octavo.schemes``.

    w ≈ q.float() * scale                            q: float8_e4m3fn, or int8
    scale = round_up_to_bf16(float32(amax) / 448)    fp8_channel, fp8_block, fp8_tensor; 1 where that is 0
    scale = 2 ** ceil(log2(amax / 448))              mxfp8, at least 2**-127; 1 where amax is 0
    scale = round_up_to_bf16(float32(amax) / 127)    int8_channel; 1 where that is 0
    q = rne(clamp(float32(w) / scale, -448, 448))    or 127, to integers

Loops over groups, arithmetic in float64 wherever the definition does not say float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GROUPS = {
    "fp8_channel": (1, None),
    "fp8_block": (128, 128),
    "fp8_tensor": (None, None),
    "mxfp8": (1, 32),
    "int8_channel": (1, None),
}


def quantize(weight: Tensor, scheme: str, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> q of the same shape, and the scales as a grid [..., row groups, column groups]."""
    if weight.dim() > 2:
        experts = [quantize(expert, scheme, parts) for expert in weight]
        stack = torch.stack([q.view(torch.uint8) for q, _ in experts]).view(experts[0][0].dtype)
        return stack, torch.stack([scale for _, scale in experts])
    rows, cols = weight.shape
    wide = weight.float().numpy()
    factors = np.zeros((rows, cols), np.float32)
    grid: list[list[float]] = []
    group_rows, group_cols = _GROUPS[scheme]
    start = 0
    for part in parts or [rows]:
        for top in range(start, start + part, group_rows or part):
            bottom = min(top + (group_rows or part), start + part)
            grid.append([])
            for left in range(0, cols, group_cols or cols):
                right = min(left + (group_cols or cols), cols)
                amax = float(np.abs(wide[top:bottom, left:right]).max())
                largest = 127 if scheme == "int8_channel" else 448
                scale = mx_scale(amax) if scheme == "mxfp8" else bf16_scale(amax, largest)
                factors[top:bottom, left:right] = scale
                grid[-1].append(scale)
        start += part
    assert start == rows
    return (int8 if scheme == "int8_channel" else e4m3)(wide / factors), torch.tensor(grid, dtype=torch.float32)


def bf16_scale(amax: float, largest: float = 448) -> float:
    """The smallest bf16 number that is no smaller than float32(amax) / 448 (or 127); 1 where that is 0."""
    quotient = float(np.float32(amax) / np.float32(largest))
    if quotient == 0:
        return 1.0
    # bf16 has 8 significant bits; its numbers below 2**-126 are 2**-133 apart
    step = 2.0 ** (max(math.frexp(quotient)[1], -125) - 8)
    return math.ceil(quotient / step) * step


def mx_scale(amax: float) -> float:
    if amax == 0:
        return 1.0
    mantissa, exponent = math.frexp(amax)  # 448 is 0.875 * 2**9
    return 2.0 ** max(exponent - 9 + (mantissa > 0.875), -127)


def int8(values: np.ndarray) -> Tensor:
    """Round to the nearest integer, ties to even, which is never beyond ±127."""
    rounded = np.rint(values.astype(np.float64))
    assert np.abs(rounded).max(initial=0) <= 127
    return torch.from_numpy(rounded).to(torch.int8)


def e4m3(values: np.ndarray) -> Tensor:
    """Clamp to ±448 and round to the nearest e4m3 number, ties to even."""
    wide = np.clip(values.astype(np.float64), -448, 448)
    _, exponents = np.frexp(wide)
    # 4 significant bits; numbers below 2**-6 are 2**-9 apart
    step = np.exp2(np.maximum(exponents - 1, -6) - 3.0)
    rounded = np.rint(wide / step) * step
    q = torch.from_numpy(rounded).to(torch.float8_e4m3fn)
    assert np.array_equal(q.double().numpy(), rounded)  # nothing was left for torch to round
    return q
