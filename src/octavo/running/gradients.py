"""Whether gradients are asked, for which kernels of their own have none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def are_asked(*operands: Tensor | None) -> bool:
    """Return True if a product of these is to have a gradient, or may be to, of forward mode."""
    if forward_ad._current_level >= 0:  # torch.func.jvp is at a level, too
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
