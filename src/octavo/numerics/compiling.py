"""Whether Triton compiles for a device; where it does not, torch's operations make the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..machine import HAS_TRITON


def may(device: torch.device) -> bool:
    """Return True if it is worth trying for a GPU."""
    return HAS_TRITON and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def tried(attempt: Callable[[], Any], instead: str) -> Any:
    """What an attempt at a kernel gives; None, and a warning, where that fails."""
    try:
        return attempt()
    except torch.OutOfMemoryError:  # says nothing of compilers
        raise
    except Exception as error:  # whatever comes of compilers, headers that they miss, and a cache on disk
        why = next(iter(str(error).splitlines()), "")
        warnings.warn(
            f"Triton can't compile here ({type(error).__name__}: {why}): {instead}, with the same bytes, but slower",
            stacklevel=1,
        )
        return None
