"""Constants in the memory of a device, made once for each."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..machine import in_memory


@functools.cache
def constant(value: float, device: torch.device) -> Tensor:
    """A number as a tensor, since torch on a GPU divides by a number by multiplying with its rounded reciprocal."""
    return torch.full((), value, dtype=torch.float32, device=device)


@functools.cache
@in_memory
def pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """byte -> the bits of two of 16 numbers as float32, that of the lower half first.

    Two float32 at a time are looked up: eight bytes take as long as four.
    """
    numbers = torch.tensor(values, dtype=torch.float32)
    both = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=-1)
    return both.view(torch.int64).flatten().to(device)
