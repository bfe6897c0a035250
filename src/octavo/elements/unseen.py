"""Views of tensors that dispatch modes are not told of.

They are four of five operations of a loader, and take longer in a mode than all else. What a view shows can be asked of
it when it is copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
        with _data_unseen():
            yield


@contextlib.contextmanager
def _data_unseen() -> Iterator[None]:
    """The same for ``tensor.data``, which torch tells modes of by another way than its table."""
    known = vars(Tensor).get("data")
    found: Any = Tensor.data
    modes = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)

    def data(tensor: Tensor) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(modes):
            return found.__get__(tensor)

    Tensor.data = property(data, found.__set__, found.__delete__)  # type: ignore[assignment]
    try:
        yield
    finally:
        if known is None:
            del Tensor.data
        else:
            Tensor.data = known
