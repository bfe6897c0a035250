"""Random numbers that a loader makes, and what it computes of them alone: how it begins, not what it loads.

torch's initialisations are more than one operation: they draw, compare, draw again where numbers are too large, copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...elements.operations import Operation, is_view, storage_key


class Generated:
    """Storages that hold such numbers, and nothing else. What can't be followed counts as values."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._purge_at = 64

    def computed(self, done: Operation) -> None:
        """An operation in which no item took part."""
        draws = _draws(done.func)
        if not draws and not self._known:
            return
        values = [tensor for tensor in done.inputs if not any(tensor is target for target in done.targets)]
        if not values:
            if draws:
                self.add((*done.targets, *done.made))
        elif all(map(self.holds, values)):
            if not is_view(done.func):
                self.add(done.made if not done.targets else ())
        else:
            for target in done.targets:
                self.forget(target)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """These hold random numbers alone, each in all of its storage."""
        if len(self._known) > self._purge_at:
            self._known = {key: found for key, found in self._known.items() if not found.expired()}
            self._purge_at = 2 * len(self._known) + 64
        for tensor in tensors:
            if (key := storage_key(tensor)) is not None and tensor.nbytes == tensor.untyped_storage().nbytes():
                self._known[key] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def holds(self, tensor: Tensor) -> bool:
        """Return True if a tensor's values are random numbers that the loader made."""
        found = self._known.get(storage_key(tensor) or 0) if self._known else None
        return found is not None and not found.expired()

    def forget(self, tensor: Tensor) -> None:
        """It may hold values from now on."""
        if self._known:
            self._known.pop(storage_key(tensor) or 0, None)


@functools.cache
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags
