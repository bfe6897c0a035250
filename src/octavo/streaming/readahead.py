"""Reading a checkpoint's files before it is known where their tensors go.

Importing a model's code and planning take seconds in which a disk has nothing to do. Meanwhile a few threads read into
the page cache what it does not hold, in the order in which a stream reads it, and the stream finds it there. It costs
memory that the kernel can take back at any time, and at most half of it. Where the kernel does not tell what is cached
(of files that one may neither write nor owns), nothing is read.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import open_regular
from ..checkpoint.header import Shard
from ..machine import usable_cpus
from ..memory import available_bytes
from .files import CACHED, RUN_WINDOWS, cached_share
from .ring import Ring

_MOST_THREADS = 8
#: what is read at once, time and again into the same memory, which stays in a core's cache
_WINDOW_BYTES, _SCRATCH_BYTES = 8 << 20, 1 << 18


class ReadAhead:
    """Entered, it begins; left, it ends within a few reads. It never fails: that is left to the stream.

    Args:
        shards: whose files; what is cached already is left alone. At most half of `available_bytes` is read.
        start: the share of them after which it begins; what is before comes last. Processes that read the same files
            begin at different places, and find in the page cache what the others have read.
    """

    def __init__(self, shards: Sequence[Shard], start: float = 0.0) -> None:
        self._shards, self._start = shards, start
        # on few cores, more would keep the thread that imports waiting
        self._ring: Ring[tuple[Path, int]] = Ring(max(2, min(_MOST_THREADS, usable_cpus() // 2)), "reading ahead")

    def __enter__(self) -> ReadAhead:
        try:
            self._ring.start(self._windows(), _Reader)
        except BaseException as error:
            self.__exit__()
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Exception):
            self._ring.finish()

    @property
    def read_bytes(self) -> int:
        """Bytes read so far."""
        return self._ring.done_bytes

    def _windows(self) -> Iterator[tuple[Path, int]]:
        room = available_bytes() // 2
        windows = [(shard, offset) for shard in self._shards for offset in range(0, shard.nbytes, _WINDOW_BYTES)]
        first = int(self._start * len(windows))
        is_cached = functools.cache(lambda path: cached_share(path) >= CACHED)  # asked when its first window comes
        for shard, offset in (*windows[first:], *windows[:first]):
            nbytes = min(_WINDOW_BYTES, shard.nbytes - offset)
            if is_cached(shard.path) or cached_share(shard.path, offset, nbytes, RUN_WINDOWS) >= CACHED:
                continue
            room -= nbytes
            if room < 0:
                return
            yield shard.path, offset


class _Reader:
    """A thread that reads ahead. It passes over what it can't read: the stream will report that."""

    def __init__(self) -> None:
        self._scratch = [bytearray(_SCRATCH_BYTES)] * (_WINDOW_BYTES // _SCRATCH_BYTES)

    def handle(self, window: tuple[Path, int]) -> int:
        path, offset = window
        with contextlib.suppress(OSError), open_regular(path) as file:
            return os.preadv(file.fileno(), self._scratch, offset)
        return 0

    def close(self) -> None:
        pass
