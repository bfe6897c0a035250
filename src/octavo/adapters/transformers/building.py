"""Building a model without memory, in this thread alone: what other threads make meanwhile is as ever.

transformers and accelerate patch classes and functions of torch for that, and set the default dtype, which all threads
of a process share. A function mode of torch is its thread's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

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
#: conversions that name a dtype without an argument for it
_TELLING = frozenset({Tensor.float, Tensor.type})


class TooMany(Exception):
    """A model has more parameters than it may have."""


class Unallocated(TorchFunctionMode):
    """Tensors are made on meta, and where nobody tells their dtype they have that of the model.

    Args:
        dtype: takes the part of torch's default dtype.
        values: tensors that get values have memory; models whose own code nobody knows may need them. (An empty one
            is on meta all the same, since transformers makes one to learn whether it has anything to initialise.)
        most: calls of torch's functions, after which it is a `TooMany`; None for any number.
    """

    def __init__(self, dtype: torch.dtype, *, values: bool, most: int | None = None) -> None:
        super().__init__()
        self._most, self._left = most, -1 if most is None else most
        self._dtype = dtype
        self._constructors = _EMPTY if values else _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
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
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and made.dtype is not self._dtype and made.dtype is torch.get_default_dtype():
            return made if _is_told(func, args, kwargs) else made.to(self._dtype)
        return made


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
