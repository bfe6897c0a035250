"""What SGLang computes of weights beside them (DeepSeek's ``w_kc``, ``w_scale``), kept where it is when they are new.

Some of it SGLang writes in place, and some it replaces: CUDA graphs would go on with the old.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def in_place(model: nn.Module) -> Iterator[None]:
    """Put tensors that replace others of their kind, meanwhile, into the memory of these."""
    before = [(module, name, value) for module in model.modules() for name, value in _plain(module).items()]
    yield
    with torch.no_grad():
        for module, name, old in before:
            new = vars(module).get(name)
            if new is not old and isinstance(new, Tensor) and (new.shape, new.dtype) == (old.shape, old.dtype):
                old.copy_(new)
                vars(module)[name] = old


def _plain(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
