"""Whose values a write carries: the pair that a loader took, followed through what it makes of it.

Names alone would not do: loaders may collect pairs before they write, and a checkpoint may hold a name twice. So every
pair is numbered, and storages remember which pair their values came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Source(NamedTuple):
    """A pair, or a tensor that came on its own."""

    number: int
    name: str
    sure: bool = False  # the values are known to be that pair's, and not only to have come after it

    @property
    def label(self) -> str:
        """What tells boxes of one source from those of another."""
        return f"{self.name}#{self.number}"


LOADER = Source(0, "the loader")


class _Joined(NamedTuple):
    """A tensor that was concatenated of several."""

    shape: tuple[int, ...]
    dim: int
    parts: tuple[tuple[int, Source | None], ...]  # lengths along dim, and whose values


class Sources:
    """The pair in hand, and the storages that hold values of pairs."""

    def __init__(self) -> None:
        self.current: Source | None = None
        self._of_storage: dict[int, tuple[Any, Source | None]] = {}
        self._joined: dict[int, tuple[Any, _Joined]] = {}
        self._count, self._purge_at = 0, 64

    def take(self, name: str, tensor: Tensor) -> None:
        """A loader gets a pair."""
        self._count += 1
        self.current = Source(self._count, name, True)
        if len(self._of_storage) > self._purge_at:
            self._of_storage = {key: found for key, found in self._of_storage.items() if not found[0].expired()}
            self._joined = {key: found for key, found in self._joined.items() if not found[0].expired()}
            self._purge_at = 2 * len(self._of_storage) + 64
        found = storage_key(tensor)
        if found is not None:
            # of a buffer that several pairs share, values can't tell whose they are
            known = self._of_storage.get(found)
            shared = known is not None and not known[0].expired()
            self._remember(found, tensor, None if shared else self.current)

    def of(self, values: Tensor | None) -> Source:
        """The source of values; of those that a loader makes of nothing, the pair in hand."""
        key = None if values is None else storage_key(values)
        if key is not None and (known := self._of_storage.get(key)) is not None and known[1] is not None:
            return known[1]
        if self.current is not None:
            return self.current._replace(sure=False)
        if key is None or values is None:
            return LOADER
        self._count += 1
        source = Source(self._count, "an unnamed tensor")
        self._remember(key, values, source)
        return source

    def _remember(self, key: int, tensor: Tensor, source: Source | None) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._of_storage[key] = (reference, source)

    def derived(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """An operation made tensors of others: the first input of a known pair tells whose they are."""
        if not self._of_storage or not outputs:
            return
        for tensor in inputs:
            known = self._of_storage.get(storage_key(tensor) or 0)
            if known is None:
                continue
            for output in outputs:
                key = storage_key(output)
                if key is not None and key not in self._of_storage:
                    self._remember(key, output, known[1])
                    joined = self._joined.get(storage_key(tensor) or 0)
                    if joined is not None and joined[1].shape == tuple(output.shape):
                        self._joined[key] = (self._of_storage[key][0], joined[1])
            return

    def rewritten(self, tensor: Tensor, values: Sequence[Tensor]) -> None:
        """Memory that holds values of one pair gets those of another: the other's, if all of it is written."""
        key = storage_key(tensor)
        known = self._of_storage.get(key or 0)
        taken = [found for value in values if (found := self._of_storage.get(storage_key(value) or 0)) is not None]
        if key is None or known is None or not taken or all(found[1] == known[1] for found in taken):
            return
        whole = tensor.nbytes == tensor.untyped_storage().nbytes() and len(taken) == 1
        self._remember(key, tensor, taken[0][1] if whole else None)
        self._joined.pop(key, None)

    def joined(self, tensors: Sequence[Tensor], dim: int, result: Tensor) -> None:
        """``torch.cat``: its parts are still those of their pairs."""
        known = [self._of_storage.get(storage_key(tensor) or 0) for tensor in tensors]
        if sum(found is not None for found in known) < 2:
            return
        self.derived(tensors, [result])
        key = storage_key(result)
        if key is None or key not in self._of_storage:
            return
        dim %= result.ndim
        parts = [(t.shape[dim], found and found[1]) for t, found in zip(tensors, known, strict=True) if t.numel()]
        self._joined[key] = (self._of_storage[key][0], _Joined(tuple(result.shape), dim, tuple(parts)))

    def split(self, view: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Source]]:
        """A write, cut where values of one pair end and those of another begin."""
        joined = self._joined.get(storage_key(values) or 0)
        if joined is None or not joined[1].shape == tuple(values.shape) == tuple(view.shape) or values.storage_offset():
            yield view, values, self.of(values)
            return
        _, dim, parts = joined[1]
        start = 0
        for length, source in parts:
            yield view.narrow(dim, start, length), values.narrow(dim, start, length), source or self.of(values)
            start += length

    def clear(self) -> None:
        self.current = None
        self._of_storage.clear()
        self._joined.clear()


def storage_key(tensor: Tensor) -> int | None:
    """What tensors that share memory have in common; None for subclasses with storages of their own kind."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None
    key: int = tensor.untyped_storage()._cdata
    return key
