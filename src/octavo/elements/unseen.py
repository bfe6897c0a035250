"""Views of tensors that dispatch modes are not told of.

They are four of five operations of a loader, and take longer in a mode than all else. What a view shows can be asked of
it when it is copied.
"""

from __future__ import annotations

import contextlib
import threading
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


class _Changed:
    """What is changed of torch, for every thread: once, however many ask for it, until the last of them is done."""

    def __init__(self) -> None:
        self._lock, self._users, self._stack = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                with contextlib.ExitStack() as stack:
                    library = stack.enter_context(torch.library._scoped_library("aten", "IMPL", "Python"))
                    for name in _VIEWS:
                        library.impl(name, torch.library.fallthrough_kernel)
                    stack.enter_context(_data_unseen())
                    self._stack = stack.pop_all()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stack.close()


_CHANGED = _Changed()


def views_unseen() -> contextlib.AbstractContextManager[None]:
    """Have dispatch modes pass over views.

    It is torch's table of kernels that is changed, so for every thread; no other follows tensors while a model is
    loaded. Several threads may ask for it at once.
    """
    return _CHANGED


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
