"""Rounding to integers on a GPU, for which torch has no kernel that divides as well."""

from __future__ import annotations

import torch
from torch import Tensor

#: elements that are widened at a time where no memory is given for that
_AT_ONCE = 1 << 20


def divide_rows(out: Tensor, weight: Tensor, scale: Tensor, scratch: Tensor | None = None) -> None:
    """Write ``weight[..., out, in] / scale[..., out, 1]`` into ``out``, divided in float32 and rounded to nearest even.

    Args:
        scratch: float32, any number of elements: rows are done as many at a time as fit.
    """
    rows = weight.shape[-2]
    each = weight.numel() // rows if rows else 0
    if not each:
        return
    if scratch is not None and scratch.numel() < each:
        scratch = None
    step = min(rows, max(1, (_AT_ONCE if scratch is None else scratch.numel()) // each))
    if scratch is None:
        scratch = torch.empty(step * each, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        part = weight[..., some, :]
        wide = scratch[: part.numel()].view(part.shape)
        torch.div(part, scale[..., some, :], out=wide)
        out[..., some, :].copy_(wide.round_())
