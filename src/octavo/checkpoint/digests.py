"""Digests of tensors: what their bytes were meant to be, kept beside the shards in ``octavo-digests.json``.

    {"algorithm": "crc32", "shards": {"model.safetensors": {"header": "0f1e2d3c", "tensors": {"a.weight": ...}}}}

A digest is the CRC-32 of a tensor's bytes in the file, eight hexadecimal digits, as ``zlib.crc32`` and others compute
it; of a header, that of all that precedes the first tensor. It tells of damage, not of intent: whoever changes a tensor
can change its digest, too. CRCs of neighbours can be combined, so bytes may come in pieces of any size and order.
"""

from __future__ import annotations

import functools
import json
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError, raise_problems, reading
from .checkpoint import Checkpoint
from .files import conforms, open_regular, read_object

NAME = "octavo-digests.json"
_ALGORITHM = "crc32"
_MAX_BYTES = 1 << 30
_ADVICE = f"The file is damaged, or was changed and {NAME} was not: fetch it again, or convert again."


# -- one tensor -------------------------------------------------------------------------------------------------------

_ONES = 0xFFFFFFFF
#: a polynomial is a number whose highest bit is the coefficient of 1, here of CRC-32's without x^32
_CRC32, _ONE = 0xEDB88320, 1 << 31


def _times(a: int, b: int) -> int:
    """The product of two polynomials, modulo that of CRC-32."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _ONES
        b = b >> 1 ^ (_CRC32 if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _shift(nbytes: int) -> int:
    """x to the power of so many bits: what a CRC is multiplied with when so many bytes follow."""
    result, square = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            result = _times(result, square)
        square = _times(square, square)
        nbytes >>= 1
    return result


class Digest:
    """The digest of ``nbytes`` that come in pieces, in any order and from any thread.

    Of bytes that come again, the first count.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # stretches that have come: where they begin and end, and their CRC-32 that begins and ends with 0
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._crcs: list[int] = []
        self._lock = threading.Lock()

    def add(self, start: int, data: memoryview) -> None:
        while gaps := self.gaps(start, start + len(data)):
            for begin, end in gaps:
                crc = zlib.crc32(data[begin - start : end - start], _ONES) ^ _ONES
                with self._lock:
                    self._insert(begin, end, crc)

    def gaps(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """The parts of a stretch that have not come."""
        found, stop = [], self.nbytes if stop is None else stop
        with self._lock:
            at = max(0, bisect_right(self._starts, start) - 1)
            while start < stop and at < len(self._starts):
                if start < min(self._starts[at], stop):
                    found.append((start, min(self._starts[at], stop)))
                start = max(start, self._stops[at])
                at += 1
        return found + ([(start, stop)] if start < stop else [])

    def _insert(self, start: int, stop: int, crc: int) -> None:
        at = bisect_left(self._starts, stop)
        if at and self._stops[at - 1] > start:
            return  # another thread has been faster
        first = last = at
        if at < len(self._starts) and self._starts[at] == stop:
            crc = _times(crc, _shift(self._stops[at] - stop)) ^ self._crcs[at]
            stop, last = self._stops[at], at + 1
        if at and self._stops[at - 1] == start:
            crc = _times(self._crcs[at - 1], _shift(stop - start)) ^ crc
            start, first = self._starts[at - 1], at - 1
        self._starts[first:last], self._stops[first:last], self._crcs[first:last] = [start], [stop], [crc]

    @property
    def complete(self) -> bool:
        return not self.gaps()

    @property
    def value(self) -> str:
        """The digest, once it is complete."""
        assert self.complete
        crc = self._crcs[0] if self.nbytes else 0
        return f"{crc ^ _times(_ONES, _shift(self.nbytes)) ^ _ONES:08x}"


# -- a shard that is written ------------------------------------------------------------------------------------------


class ShardDigests:
    """The digests of a shard's tensors, made of what is written; ``header`` is all that precedes them."""

    def __init__(self, header: bytes) -> None:
        self._header = header
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        self._digests = {name: Digest(end - begin) for name, (begin, end) in spans.items()}
        self._at = {len(header) + begin: self._digests[name] for name, (begin, end) in spans.items() if end > begin}

    def add(self, tensor: int, offset: int, data: memoryview) -> None:
        """Take bytes that are written at ``offset``, of the tensor that begins at ``tensor``."""
        self._at[tensor].add(offset - tensor, data)

    def to_dict(self) -> dict[str, Any]:
        """All that is recorded of the shard."""
        tensors = {name: digest.value for name, digest in self._digests.items()}
        return {"header": f"{zlib.crc32(self._header):08x}", "tensors": tensors}


def to_text(shards: Mapping[str, Any]) -> str:
    """The content of the file: ``shards`` maps their names to what `ShardDigests.to_dict` gave."""
    return json.dumps({"algorithm": _ALGORITHM, "shards": shards}, indent=1) + "\n"


# -- a checkpoint that is read ----------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """The digests that a checkpoint came with."""

    path: Path
    tensors: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Recorded:
        """Those of exactly this checkpoint; a `CheckpointError` if there are none, or if they are of another."""
        path = checkpoint.folder / NAME
        if not path.exists():
            raise CheckpointError(
                f"{checkpoint.path}: has no {NAME}, which octavo convert --digests writes, so nothing says what its "
                "bytes were. Compare with the source: octavo verify --against."
            )
        found = read_object(path, _MAX_BYTES)
        shards: Any = found.get("shards")
        if found.get("algorithm") != _ALGORITHM or not conforms(shards, dict[str, dict[str, Any]]):
            raise CheckpointError(f"{path}: not what octavo writes, or of a later version")
        problems: list[str] = []
        tensors: dict[str, str] = {}
        for shard, infos in zip(checkpoint.shards, checkpoint.by_shard(), strict=True):
            name = shard.path.name
            recorded = shards.get(name, {})
            if not conforms(recorded.get("tensors"), dict[str, str]):
                problems.append(f"{name}: no digests of it in {NAME}")
                continue
            before = shard.nbytes - sum(info.nbytes for info in infos)
            if recorded.get("header") != _crc_of_header(shard.path, before):
                problems.append(f"{name}: its header is not the one that was written")
            names = {info.name for info in infos}
            problems += [f"{name}: tensor {one!r} has no digest" for one in names - recorded["tensors"].keys()]
            problems += [f"{name}: tensor {one!r} is gone" for one in recorded["tensors"].keys() - names]
            tensors |= recorded["tensors"]
        if checkpoint.path.is_dir():
            here = {shard.path.name for shard in checkpoint.shards}
            # a shard without tensors is in no index
            problems += [f"{name}: gone" for name in shards.keys() - here if shards[name].get("tensors") != {}]
        raise_problems(CheckpointError, checkpoint.path, sorted(problems), _ADVICE)
        return cls(path, tensors)

    def check(self, shard: Path, tensor: str, found: str) -> None:
        """Raise unless a tensor has the digest that was recorded."""
        if self.tensors[tensor] != found:
            raise CheckpointError(
                f"{shard}: tensor {tensor!r}: the digest of its bytes is {found}, and was {self.tensors[tensor]} when "
                f"they were written. {_ADVICE}"
            )


def _crc_of_header(path: Path, nbytes: int) -> str:
    with reading(path), open_regular(path) as file:
        return f"{zlib.crc32(file.read(nbytes)):08x}"
