"""One global scale for matrices in NVFP4 that an engine joins to one: it takes one for all, whatever the others are.

A matrix has a global scale by its largest weight, nearly always the same one (see `octavo.numerics.nvfp4`). Where those
of q, k and v, or of gate and up, differ, an engine would scale some of them wrongly. So scales of groups are made
smaller by as much as the largest global scale is larger than their own. Both are powers of two: only groups of very
small weights, whose scales e4m3 then holds with fewer bits, are rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...numerics.nvfp4 import E4M3


@torch.no_grad()
def agree(scales: Tensor, divisors: Tensor, rows: Sequence[int]) -> bool:
    """Bring joined matrices to one global scale, in place; False, and nothing is done, where they have one.

    Args:
        scales: of groups, e4m3 [..., out, in / 16].
        divisors: one by the global scale of each matrix, float32 [..., matrices].
        rows: how many each matrix has of ``scales``.
    """
    least = divisors.amin(-1, keepdim=True)
    if bool((divisors == least).all()):
        return False
    factors = (least / divisors).unsqueeze(-1)
    for number, part in enumerate(torch.split(scales, [*rows], dim=-2)):
        part.copy_((part.float() * factors[..., number : number + 1, :]).to(E4M3))
    divisors.copy_(least.expand_as(divisors))
    return True
