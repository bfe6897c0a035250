"""Views that no mode is told of: what is changed of torch for that, and that it is as before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.elements.unseen import views_unseen


class Seen(TorchDispatchMode):
    """How many operations this mode is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def seen() -> int:
    """How many of two views a mode is told of."""
    tensor = torch.zeros(4, 4)
    with Seen() as mode:
        assert tensor.data.t().shape == (4, 4)
    return mode.count


def test_two_that_overlap_leave_nothing_changed() -> None:
    """As two threads do: the first is done before the second is."""
    first, second = views_unseen(), views_unseen()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    try:
        assert seen() == 0
    finally:
        second.__exit__(None, None, None)
    assert seen() == 2
    assert "data" not in vars(Tensor)
