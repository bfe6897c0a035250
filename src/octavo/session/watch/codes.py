"""Numbers without their scales: FP8 and int8 as pairs bring it, and what a loader makes of it by moving and casting.

``weight.to(torch.bfloat16)`` looks like a weight, and is none before it meets its scale. What arithmetic makes of codes
and of anything else counts as values, and so does whatever can't be followed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...checkpoint import dtypes
from ...checkpoint.companions import of_weight
from ...checkpoint.packing import are_codes
from ...elements.operations import Operation, is_view, offset_of, storage_key

aten = torch.ops.aten
#: what copies, though torch calls it arithmetic
_COPIES = frozenset({aten.clone, aten.copy_})
#: what has the values of each of the tensors that it is given
_JOINS = frozenset({aten.cat, aten.stack})


class _Marked(NamedTuple):
    """Bytes of a storage that hold codes."""

    begin: int
    end: int
    dtype: torch.dtype  # in which they came


class Codes:
    """Memory of other dtypes that holds such numbers; of their own dtypes, a tensor tells itself."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, list[_Marked]]] = {}  # by storage
        self._scales: dict[int, Any] = {}  # storages of scales, which may be FP8 themselves
        self._purge_at = 64

    def take(self, name: str, tensor: Tensor) -> None:
        """A loader gets a pair."""
        self.forget(tensor)
        if (key := storage_key(tensor)) is None or not is_coded(tensor):
            return
        if of_weight(name) is not None:
            self._scales[key] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        else:
            self._scales.pop(key, None)

    def dtype_of(self, tensor: Tensor) -> torch.dtype | None:
        """The dtype in which a tensor's numbers came, if they lack their scales; None if they are values."""
        if is_coded(tensor):
            return None if self._is_scale(tensor) else tensor.dtype
        found = self._known.get(storage_key(tensor) or 0) if self._known else None
        if found is None or found[0].expired():
            return None
        begin, end = _bytes_of(tensor)
        return next((mark.dtype for mark in found[1] if mark.begin < end and begin < mark.end), None)

    def _is_scale(self, tensor: Tensor) -> bool:
        found = self._scales.get(storage_key(tensor) or 0) if self._scales else None
        return found is not None and not found.expired()

    def computed(self, done: Operation) -> None:
        """An operation in which no item took part."""
        if is_view(done.func):
            return
        values = [t for t in done.inputs if not any(t is target for target in done.targets) and is_number(t)]
        found = [self.dtype_of(tensor) for tensor in values]
        dtype = next((dtype for dtype in found if dtype is not None), None)
        packet = done.func.overloadpacket
        arithmetic = done.func.namespace != "aten" or (torch.Tag.pointwise in done.func.tags and packet not in _COPIES)
        moved = packet in _JOINS or (None not in found and not arithmetic)
        for tensor in done.targets:
            self.forget(tensor)
        if dtype is not None and moved:
            for tensor in (*done.targets, *done.made):
                if not is_coded(tensor) and tensor.dtype.is_floating_point:
                    self._mark(tensor, dtype)

    def forget(self, tensor: Tensor) -> None:
        """It has other values from now on."""
        key = storage_key(tensor) if self._known else None
        found = None if key is None else self._known.get(key)
        if key is None or found is None:
            return
        begin, end = _bytes_of(tensor)
        left = []
        for mark in found[1]:
            left += [mark._replace(end=min(mark.end, begin)), mark._replace(begin=max(mark.begin, end))]
        left = [mark for mark in left if mark.begin < mark.end]
        if left:
            self._known[key] = found[0], left
        else:
            del self._known[key]

    def _mark(self, tensor: Tensor, dtype: torch.dtype) -> None:
        if not tensor.numel() or (key := storage_key(tensor)) is None:
            return
        if len(self._known) > self._purge_at:
            self._known = {key: found for key, found in self._known.items() if not found[0].expired()}
            self._purge_at = 2 * len(self._known) + 64
        found = self._known.get(key)
        if found is None or found[0].expired():
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            found = self._known[key] = reference, []
        found[1].append(_Marked(*_bytes_of(tensor), dtype))


def is_coded(tensor: Tensor) -> bool:
    """See `are_codes`."""
    return are_codes(dtypes.NAMES.get(tensor.dtype, ""), tensor.ndim)


def is_number(tensor: Tensor) -> bool:
    """Return False for what says which elements are meant."""
    return tensor.dtype.is_floating_point or is_coded(tensor)


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in its storage, and ends."""
    begin, reach = offset_of(tensor), sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.itemsize, (begin + reach + 1) * tensor.itemsize
