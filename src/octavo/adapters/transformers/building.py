"""Building a model without memory, in this thread alone: what other threads make meanwhile is as ever.

transformers and accelerate patch classes and functions of torch for that, and set the default dtype, which all threads
of a process share. A function mode of torch is its thread's own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from ...elements.operations import tensors_in

#: constructors that give no values: what is made by them alone can't be told from what is on meta
_EMPTY = frozenset({torch.empty, torch.empty_strided, torch.empty_permuted})
#: constructors of torch's default dtype, whatever they are given
_DEFAULT = _EMPTY | {torch.ones, torch.zeros, torch.rand, torch.randn}
#: what gives a tensor on meta no values, and takes a third of a millisecond for it
_INITS = frozenset(
    getattr(place, name)
    for place in (Tensor, torch.nn.init)
    for name in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_")
    if hasattr(place, name)
)
#: what the constructors of `torch.Tensor` call, given sizes and given numbers
_OLD = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.lift_fresh.default})
#: conversions that name a dtype without an argument for it
_TELLING = frozenset({Tensor.float, Tensor.type})


class TooMany(Exception):
    """A model has more parameters than it may have."""


@contextlib.contextmanager
def unallocated(dtype: torch.dtype, *, values: bool, most: int | None = None) -> Iterator[None]:
    """Make tensors on meta, and where nobody tells their dtype give them that of the model.

    Args:
        dtype: takes the part of torch's default dtype.
        values: tensors that get values have memory; models whose own code nobody knows may need them. (An empty one
            is on meta all the same, since transformers makes one to learn whether it has anything to initialise.)
        most: calls of torch's functions, after which it is a `TooMany`; None for any number.
    """
    old = _OldConstructors(dtype)
    with old, _Functions(dtype, old, values, most):
        yield


class _Functions(TorchFunctionMode):
    """What torch's functions make."""

    def __init__(self, dtype: torch.dtype, old: _OldConstructors, values: bool, most: int | None) -> None:
        super().__init__()
        self._most, self._left = most, -1 if most is None else most
        self._dtype = dtype
        self._old = old
        self._constructors = _EMPTY if values else _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):  # the other mode's
            return func(*args, **kwargs)
        self._left -= 1
        if not self._left:
            raise TooMany
        if func in _INITS and (args[0] if args else kwargs["tensor"]).is_meta:
            return args[0] if args else kwargs["tensor"]
        if func is torch.linspace and self._most is not None and _steps(*args, **kwargs) > self._most:
            raise TooMany  # a schedule of numbers, one a layer
        if kwargs.get("device") is None and (func in self._constructors or (func is torch.tensor and args == ([],))):
            # transformers, too, leaves this one its values: models make schedules of numbers by it
            kwargs = {**kwargs, "device": "cpu" if func is torch.linspace else "meta"}
        if func in _DEFAULT and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": self._dtype}
        self._old.seen = True
        try:
            made = func(*args, **kwargs)
        finally:
            self._old.seen = False
        if isinstance(made, Tensor) and made.dtype is not self._dtype and made.dtype is torch.get_default_dtype():
            return made if _is_told(func, args, kwargs) else made.to(self._dtype)
        return made


class _OldConstructors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``torch.Tensor(...)`` gives the model's dtype. Function modes don't see it, nor ``torch.FloatTensor(...)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self.seen = False  # whether a function runs that function modes see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.seen and func in _OLD and "FloatTensor" not in _caller().co_names:
            if kwargs.get("dtype") is torch.get_default_dtype():
                kwargs = {**kwargs, "dtype": self._dtype}
            elif args and isinstance(args[0], Tensor) and args[0].dtype is torch.get_default_dtype():
                args = (args[0].to(self._dtype),)
        return func(*args, **kwargs)


def _caller() -> CodeType:
    """The code that has called into torch."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith("torch.") and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


def _steps(start: Any = 0, end: Any = 0, steps: Any = 0, **_: Any) -> int:
    """How many numbers `torch.linspace` would make."""
    return int(steps)


def _is_told(func: Any, args: Any, kwargs: Any) -> bool:
    """Return True if arguments tell the dtype of a result: one that is given, or that of numbers with a dtype."""
    if func is Tensor.to and "get_default_dtype" in sys._getframe(2).f_code.co_names:
        return False  # the caller asks torch for the dtype that the model's takes the place of
    if func in _TELLING or kwargs.get("dtype") is not None:
        return True
    if any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors_in((args, kwargs))):
        return True
    given = (*args, *kwargs.values())
    return any(isinstance(v, torch.dtype) or (hasattr(v, "dtype") and not isinstance(v, Tensor)) for v in given)
