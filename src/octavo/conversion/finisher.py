"""Whatever writes the shards of a conversion: the threads of a stream, and one that syncs and records what is complete.

None of them outlives its conversion, and no file is closed before they have ended.
"""

from __future__ import annotations

import contextlib
import functools
import queue
from collections.abc import Iterator

from ..checkpoint.digests import ShardDigests
from ..streaming.outfile import OutFile, disk_error
from ..streaming.stream import Stream
from ..streaming.workers import Workers
from .layout import ShardLayout
from .partial import PartialFolder

#: shards that may wait to be synced: each has files open
_WAITING = 8


class Finisher:
    """Finishes shards one after another in a thread of its own: the disk is waited for while the next one is read."""

    def __init__(self, partial: PartialFolder) -> None:
        self._partial = partial
        self._files: list[OutFile] = []
        self._stream: Stream | None = None
        self._complete: queue.SimpleQueue[tuple[OutFile, ShardLayout, ShardDigests | None] | None] = queue.SimpleQueue()
        # an entry for each that may still be submitted; a semaphore would not bear an interrupt
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(_WAITING):
            self._room.put(None)
        self._workers = Workers(f"syncing what is in {partial.path}")
        self._begun = False
        self._stops = 0
        self._error: BaseException | None = None

    @classmethod
    @contextlib.contextmanager
    def of(cls, partial: PartialFolder) -> Iterator[Finisher]:
        """Left, it has finished all that is complete, and raises the first error."""
        finisher = cls(partial)
        partial.keep_for(finisher.close)
        try:
            yield finisher
            finisher.close()
            finisher.check()
        finally:
            finisher.close()

    def open(self, shard: ShardLayout, mode: int) -> OutFile:
        """A file for a shard that is not complete; ``mode`` is what others may do with it, less the umask."""
        result = self._partial.result
        opener = functools.partial(result.opener, mode=mode)
        made: queue.SimpleQueue[OutFile | BaseException] = queue.SimpleQueue()

        def make() -> None:
            try:
                file = OutFile(result.path / self._partial.part_of(shard.name), shard.nbytes, opener)
                self._files.append(file)
                made.put(file)
            except BaseException as error:
                made.put(error)

        # in the main thread an interrupt could come between opening a file and keeping it, which nobody would close
        self._workers.start(make, "octavo-open")
        found = made.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def fill(self, stream: Stream, file: OutFile) -> Stream:
        """Note that a stream writes to a file."""
        stream.ring.workers.what = f"reading {stream.checkpoint.path}, writing {file.path}"
        self._stream = stream
        return stream

    def submit(self, file: OutFile, shard: ShardLayout, digests: ShardDigests | None) -> None:
        """Have a shard that is complete synced, renamed and recorded; raises what went wrong with an earlier one.

        Waits where the disk is slower than what is written.
        """
        if not self._begun:
            self._begun = True
            self._workers.start(self._work, "octavo-sync")
        self._room.get()
        self.check()
        self._complete.put((file, shard, digests))

    def check(self) -> None:
        """Raise what went wrong with a shard that was complete."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until nothing writes any more, and close all files. A second interrupt leaves out what has not begun."""
        try:
            if self._stream is not None:
                self._stream.ring.finish()
        finally:
            interrupt = self._workers.finish(self._no_more)
            try:
                with contextlib.ExitStack() as stack:
                    for file in self._files:
                        stack.callback(file.close)
                    if interrupt is not None:
                        raise interrupt
            finally:
                del interrupt

    def _no_more(self) -> None:
        self._stops += 1
        self._complete.put(None)

    def _work(self) -> None:
        while (complete := self._complete.get()) is not None:
            file, shard, digests = complete
            try:
                if self._error is None and self._stops < 2:
                    file.sync()
                    file.close()
                    self._partial.finish(shard.name, shard.nbytes, None if digests is None else digests.to_dict())
            except OSError as error:
                self._error = disk_error(self._partial.result.path / shard.name, error)
            except BaseException as error:
                self._error = error
            self._room.put(None)
