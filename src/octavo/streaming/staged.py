"""Accelerators: their streams, and memory of theirs into which bytes are copied as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..elements.pieces import Piece


def backend_of(device: torch.device) -> Any:
    """The module of torch that has a device's streams and events: `torch.cuda` (also for ROCm) or `torch.xpu`.

    None for a device without streams, which does one thing after another.
    """
    backend: Any = None if device.type == "cpu" else getattr(torch, device.type)
    return backend if hasattr(backend, "Stream") else None


def wait_for(device: torch.device) -> None:
    """Block until the device has done what this thread has given to its current stream."""
    backend = backend_of(device)
    if backend is not None:
        backend.current_stream(device).synchronize()


class Staged:
    """Memory of a device into which bytes are copied, seen as elements of any dtype."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(-(-nbytes // 8) * 8, dtype=torch.uint8, device=device)
        self._typed: dict[torch.dtype, Tensor] = {}

    def view(self, dtype: torch.dtype, piece: Piece) -> Tensor:
        """The elements of a piece, whose offset and strides count within this memory (a view)."""
        typed = self._typed.get(dtype)
        if typed is None:
            typed = self._typed[dtype] = self.bytes.view(dtype)
        return typed.as_strided(piece.size, piece.src_strides, piece.src_off)
