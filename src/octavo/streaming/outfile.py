"""A file of known size that several threads fill, each byte once.

Long writes go past the page cache (``O_DIRECT``) where the file system allows it: filling the page cache with gigabytes
that nobody reads again costs more than all of quantizing, and syncing comes on top. The pages at the two ends of a
write, which it shares with its neighbours, go through the cache; a page written past it belongs to one write alone, so
the two never meet.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterable
from types import TracebackType

import numpy as np

from ..checkpoint.files import Opener
from ..errors import OutputError
from ..machine import PAGE

#: shorter writes are not worth a wait for the disk
_DIRECT_BYTES = 256 << 10
_DIRECT_BLOCK_BYTES = 4 << 20
#: writes through the page cache larger than this were measured up to ten times slower: see docs/log.md
_BLOCK_BYTES = 1 << 20
#: what a file system answers to what it knows nothing of
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
#: what helps before the same command is run again
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "allow larger files there (see ulimit -f)",
    errno.EROFS: "mount that file system for writing",
    errno.EACCES: "see to it that you may write there",
    errno.EPERM: "see to it that you may write there",
    errno.EXDEV: "see to it that the folder and its target are on one file system",
    errno.EMFILE: "let the process open more files (ulimit -n)",
    errno.EIO: "see to that disk, or to the way to it,",
    errno.ESTALE: "see to that disk, or to the way to it,",
}


def disk_error(path: object, error: OSError) -> OutputError:
    """The error for a user whose disk is full, failing, or not to be written."""
    advice = f"{_ADVICE[error.errno]} and " if error.errno in _ADVICE else ""
    return OutputError(
        f"{path}: writing failed: {error.strerror}. Finished shards are kept: {advice}run the same command again to go "
        "on."
    )


def close_all(descriptors: Iterable[int]) -> None:
    """Close each, and then raise what went wrong with one of them."""
    with contextlib.ExitStack() as stack:
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)


def sync_folder(folder: int) -> None:
    """Wait until the entries of a folder are on the disk, where its file system can tell."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def _create(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)


def _claim(descriptor: int, nbytes: int) -> None:
    """Make a file so long, and claim its room where the file system can do that."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    return os.ftruncate(descriptor, nbytes)


class OutFile:
    """A new file, its room claimed at once, so that a full disk is an error now and not after an hour.

    What has the name already, be it a link, is an error and is left alone.

    Raises:
        OutputError: here and in `write`, with advice.
    """

    def __init__(self, path: str | os.PathLike[str], nbytes: int, opener: Opener = _create) -> None:
        self.path = path
        self._buffered = self._direct = -1
        self._blocks = threading.local()  # page-aligned memory of each writing thread
        try:
            self._buffered = opener(os.fspath(path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
            _claim(self._buffered, nbytes)
            if hasattr(os, "O_DIRECT"):
                with contextlib.suppress(OSError):  # not on this file system
                    # not by its path, which may name another file by now
                    self._direct = os.open(f"/proc/self/fd/{self._buffered}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except BaseException as error:  # Ctrl-C, too
            self.close()
            if isinstance(error, OSError):
                raise disk_error(path, error) from error
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write ``data``, bytes, at ``offset``."""
        try:
            begin = -(-offset // PAGE) * PAGE
            end = (offset + len(data)) // PAGE * PAGE
            if self._direct < 0 or end - begin < _DIRECT_BYTES:
                self._write_buffered(data, offset)
                return
            self._write_buffered(data[: begin - offset], offset)
            self._write_direct(data[begin - offset : end - offset], begin)
            self._write_buffered(data[end - offset :], end)
        except OSError as error:
            raise disk_error(self.path, error) from error

    def _write_buffered(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._buffered, data[done : done + _BLOCK_BYTES], offset + done)

    def _write_direct(self, data: memoryview, offset: int) -> None:
        """Both ends are on page boundaries."""
        if not hasattr(self._blocks, "view"):
            self._blocks.view = memoryview(mmap.mmap(-1, _DIRECT_BLOCK_BYTES))
        block: memoryview = self._blocks.view
        done = 0
        while done < len(data):
            part = data[done : done + _DIRECT_BLOCK_BYTES]
            # numpy lets other threads run meanwhile
            np.copyto(np.frombuffer(block[: len(part)], np.uint8), np.frombuffer(part, np.uint8))
            try:
                written = os.pwrite(self._direct, block[: len(part)], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                written = 0
            if written % PAGE or not written:  # the file system has other ideas of what is aligned
                self._write_buffered(part, offset + done)
                written = len(part)
            done += written

    def sync(self) -> None:
        """Wait until all of it is on the disk; raises OSError."""
        os.fsync(self._buffered)

    def close(self) -> None:
        # forgotten first: the numbers may soon be those of other files
        descriptors, self._buffered, self._direct = (self._buffered, self._direct), -1, -1
        close_all(descriptor for descriptor in descriptors if descriptor >= 0)

    def __del__(self) -> None:
        self.close()  # should Ctrl-C have come before it was anybody's

    def __enter__(self) -> OutFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
