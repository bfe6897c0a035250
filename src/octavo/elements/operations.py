"""Tensors and operations as torch describes them: which tensors share memory, and which an operation writes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten


class Operation(NamedTuple):
    """An operation of torch that has been carried out."""

    func: Any
    args: Sequence[Any]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]  # those of its inputs that it wrote
    made: Sequence[Tensor]


def storage_key(tensor: Tensor) -> int | None:
    """The identity of a tensor's memory, equal for all its views; None for subclasses with memory of their own kind."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    key: int = tensor.untyped_storage()._cdata
    return key


def offset_of(tensor: Tensor) -> int:
    """``storage_offset``, which is no symbol here."""
    return int(tensor.storage_offset())


def view_on(storage: Any, like: Tensor, offset: int, device: torch.device) -> Tensor:
    """A view of a storage, of the shape, strides and dtype of ``like``."""
    empty = torch.empty(0, dtype=like.dtype, device=device)
    return empty.set_(storage, offset, like.shape, like.stride())


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among an operation's arguments or results (torch's own tree functions take several times longer)."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value)
    return found


def swapped(values: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with other tensors in their places."""
    if isinstance(values, Tensor):
        return swap(values)
    if isinstance(values, dict):
        return {key: swapped(value, swap) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(swapped(value, swap) for value in values)
    return values


@functools.cache
def is_view(func: Any) -> bool:
    """Return True if the results share the memory of an argument that is not written."""
    if func.overloadpacket is aten._unsafe_view:
        return True
    schema = func._schema
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return False
    return any(r.alias_info is not None for r in schema.returns)


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [value] if isinstance(value, Tensor) else [v for v in value or () if isinstance(v, Tensor)]
    return found


class PlainDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Without torch's wrapper, whose first call imports the compiler: a second and 100 MiB, for nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Operations within are plain: a mode that lets one pass takes longer than the operation."""
    if not torch._C._len_torch_dispatch_stack():  # nobody follows them
        yield
        return
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
