"""What is read of a checkpoint, compared with the digests that it came with."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.digests import Digest, Recorded
from ..checkpoint.header import TensorInfo


class Checks:
    """Takes what is read, from any thread; raises with the last byte of a tensor that is not what was written.

    So no tensor is complete before it has been compared. What is read twice is compared twice.

    Raises:
        CheckpointError: there are no digests, or they are those of other tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._recorded = checkpoint, Recorded.of(checkpoint)
        self._infos = [
            sorted((info for info in infos if info.nbytes), key=lambda info: info.offset)
            for infos in checkpoint.by_shard()
        ]
        self._begun: dict[str, list[Digest]] = {}  # one for each time that a tensor is read
        self._lock = threading.Lock()

    def add(self, shard: int, offset: int, data: memoryview) -> None:
        """Take bytes that were read at ``offset`` of a shard."""
        infos, end = self._infos[shard], offset + len(data)
        at = max(0, bisect_right(infos, offset, key=lambda info: info.offset) - 1)
        while at < len(infos) and infos[at].offset < end:
            info = infos[at]
            start, stop = max(offset, info.offset), min(end, info.offset + info.nbytes)
            if start < stop:
                self._add(info, start - info.offset, data[start - offset : stop - offset])
            at += 1

    def _add(self, info: TensorInfo, start: int, data: memoryview) -> None:
        stretch = (start, start + len(data))
        with self._lock:
            begun = self._begun.setdefault(info.name, [])
            digest = next((digest for digest in begun if digest.gaps(*stretch) == [stretch]), None)
            if digest is None:
                digest = Digest(info.nbytes)
                begun.append(digest)
        digest.add(start, data)
        if digest.complete:
            self._recorded.check(self._checkpoint.shards[info.shard].path, info.name, digest.value)

    def rest(self) -> Iterator[tuple[TensorInfo, int, int]]:
        """What has not been read of tensors that were read in part: tensor, first byte, last byte + 1."""
        for name, begun in self._begun.items():
            for digest in list(begun):
                yield from ((self._checkpoint.stored[name], start, stop) for start, stop in digest.gaps())
