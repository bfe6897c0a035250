"""Functions that torch.compile takes as one opaque operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def opaque(schema: str, fake: Callable[..., Any], device: str = "cuda") -> Callable[[Function], Function]:
    """Make a function, under torch.compile, one opaque operation: ``torch.ops.octavo.<its name>``.

    Args:
        schema: of its arguments and results, in torch's notation.
        fake: the same function on tensors without data.
        device: the type of the devices on which it is called.
    """

    def decorate(function: Function) -> Function:
        name = function.__name__
        made = torch.library.custom_op(f"octavo::{name}", function, mutates_args=(), device_types=device, schema=schema)
        made.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return getattr(torch.ops.octavo, name)(*args)
            return function(*args)

        return call  # type: ignore[return-value]

    return decorate
