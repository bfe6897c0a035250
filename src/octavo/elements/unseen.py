"""Views of tensors that dispatch modes are not told of.

They are four of five operations of a loader, and take longer in a mode than all else. What a view shows can be asked of
it when it is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: of which a loader makes many
_VIEWS = (
    "as_strided",
    "permute",
    "select.int",
    "slice.Tensor",
    "split.Tensor",
    "squeeze.dim",
    "t",
    "transpose.int",
    "unbind.int",
    "unsqueeze",
    "view",
)


@contextlib.contextmanager
def views_unseen() -> Iterator[None]:
    """Have dispatch modes pass over views.

    It is torch's table of kernels that is changed, so for every thread; no other follows tensors while a model is
    loaded.
    """
    with torch.library._scoped_library("aten", "IMPL", "Python") as library:
        for name in _VIEWS:
            library.impl(name, torch.library.fallthrough_kernel)
        yield
