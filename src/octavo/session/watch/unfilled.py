"""Memory that loaders have allocated and not written. Copied or registered, it would look like weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...elements.boxes import Box, Gaps
from ...elements.operations import Operation, offset_of, storage_key
from ...elements.views import Layout, NoBoxError, layout_of

aten = torch.ops.aten
_ALLOCATIONS = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})
#: boxes of a write beyond which nobody follows
_MANY = 256


class _Memory(NamedTuple):
    reference: Any
    itemsize: int
    layout: Layout
    gaps: Gaps


class Unfilled:
    """The gaps of such memory. Whatever can't be followed counts as filled."""

    def __init__(self) -> None:
        self._memory: dict[int, _Memory] = {}
        self._purge_at = 64

    def computed(self, done: Operation) -> None:
        """An operation in which no item took part."""
        if done.func.overloadpacket in _ALLOCATIONS and not done.targets:
            for tensor in done.made:
                self._allocated(tensor)
        if not self._memory:
            return
        for target in done.targets:
            self._wrote(target)
        if done.func.namespace != "aten":  # what collectives and engines' kernels write, their schemas need not say
            for tensor in done.inputs:
                self.forget(tensor)

    def forget(self, tensor: Tensor) -> None:
        """Nobody can tell what is written to it."""
        if self._memory and (key := storage_key(tensor)) is not None:
            self._memory.pop(key, None)

    def gaps(self, view: Tensor) -> list[Box]:
        """The boxes of a view that nothing was written to; the whole view where they are not boxes of it."""
        found = self._find(view)
        boxes = [] if found is None else self._boxes(found, view)
        if found is None or not any(box.common(gap) for box in boxes for gap in found.gaps.boxes):
            return []
        if (found.layout.shape, found.layout.strides) == (tuple(view.shape), view.stride()):
            return list(found.gaps.boxes)
        return [Box((0,) * view.ndim, tuple(view.shape))]

    def _allocated(self, tensor: Tensor) -> None:
        if tensor.is_meta or not tensor.numel() or (key := storage_key(tensor)) is None:
            return
        if len(self._memory) > self._purge_at:
            self._memory = {key: found for key, found in self._memory.items() if not found.reference.expired()}
            self._purge_at = 2 * len(self._memory) + 64
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        layout = layout_of(tuple(tensor.shape), tensor.stride())
        self._memory[key] = _Memory(reference, tensor.itemsize, layout, Gaps(tensor.shape))

    def _wrote(self, view: Tensor) -> None:
        found = self._find(view)
        if found is None:
            return
        boxes = self._boxes(found, view)
        for box in boxes:
            found.gaps.fill(box)
        if not boxes or not found.gaps:
            self.forget(view)

    def _find(self, view: Tensor) -> _Memory | None:
        key = storage_key(view) if self._memory else None
        found = None if key is None else self._memory.get(key)
        if found is not None and found.reference.expired():
            return None
        return found

    def _boxes(self, found: _Memory, view: Tensor) -> list[Box]:
        if view.itemsize != found.itemsize:
            return []
        try:
            return found.layout.boxes(offset_of(view), view.shape, view.stride(), at_most=_MANY)
        except NoBoxError:
            return []
