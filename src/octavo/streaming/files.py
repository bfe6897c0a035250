"""The shards' file descriptors, and how their bytes are read: through the page cache, or past it.

What is in the page cache is read from there. What is not is read past it (``O_DIRECT``) into aligned memory: the kernel
then copies nothing, and does not drop what others need. Which it is, is looked up for each file when it is opened, by
asking for some of its pages (``mincore``), and for each read of a file that is there in part; the kernel tells that of
a file that one may write or owns.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import open_regular
from ..checkpoint.header import Shard, TensorInfo
from ..elements.pieces import Piece
from ..errors import CheckpointError, SourceChangedError, reason
from ..machine import PAGE, resident_pages
from .checks import Checks
from .outfile import close_all

#: windows of a file that are looked up, those of a single read, and the share of them that must be cached for either to
#: count as such
_WINDOWS, RUN_WINDOWS, _WINDOW_BYTES, CACHED = 64, 4, 1 << 16, 0.9
_REST_BYTES = 1 << 20


class Files:
    """Shared read-only descriptors of a checkpoint's shards, opened when first needed.

    Args:
        direct_io: True or False to read past the page cache or through it; None looks, for each file.
        tensors: what errors name.
        checks: told of all that is read.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        direct_io: bool | None = False,
        tensors: Iterable[TensorInfo] = (),
        checks: Checks | None = None,
    ) -> None:
        self._shards, self._tensors, self._checks = shards, tensors, checks
        self._direct_io = direct_io
        self._buffered: dict[int, int] = {}
        self._direct: dict[int, int | None] = {}
        self._read: set[int] = set()
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, shard: int, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` of the shard, or raise naming the file."""
        self._read_into(shard, view, offset)
        if self._checks is not None:
            self._checks.add(shard, offset, view)

    def _read_into(self, shard: int, view: memoryview, offset: int) -> None:
        descriptor = self._open(shard)[0]
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self._shards[shard].path}: reading {len(view):,} bytes at {offset:,}"
                    f"{self._tensor_at(shard, offset + done)} failed: {reason(error)}"
                ) from error
            if count == 0:
                raise SourceChangedError(
                    f"{self._shards[shard].path}: ended at byte {os.fstat(descriptor).st_size:,} while being read"
                    f"{self._tensor_at(shard, offset + done)}; it was {self._shards[shard].nbytes:,} bytes long when "
                    "opened. Run again when nothing writes to the checkpoint."
                )
            done += count

    def read_piece(self, info: TensorInfo, piece: Piece, view: memoryview) -> int:
        """Read a piece of a tensor into the beginning of ``view``, in file order; returns its bytes."""
        bits, at = dtypes.moved_bits(info.dtype_name), 0
        if piece.numel:
            length, offsets = piece.runs()
            run_bytes = length * bits // 8
            for offset in offsets:
                self.read_into(info.shard, view[at : at + run_bytes], info.offset + offset * bits // 8)
                at += run_bytes
        return at

    def read_values(self, info: TensorInfo, piece: Piece) -> Tensor:
        """Read a piece of a tensor into memory of its own."""
        flat = torch.empty(piece.numel, dtype=info.dtype, device="cpu")
        self.read_piece(info, piece, memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return piece.from_file_order(flat)

    def name_of(self, info: TensorInfo) -> str:
        """The name of the file that holds a tensor."""
        return self._shards[info.shard].path.name

    def _tensor_at(self, shard: int, offset: int) -> str:
        for info in self._tensors:
            if info.shard == shard and info.offset <= offset < info.offset + info.nbytes:
                return f" (tensor {info.name!r}: bytes {info.offset:,} to {info.offset + info.nbytes:,})"
        return ""

    def read_run(self, shard: int, view: memoryview, offset: int, nbytes: int) -> int:
        """Read into page-aligned memory, past the page cache if that is the way of this file.

        Returns where in ``view`` the bytes begin. Its length bounds what alignment may add.
        """
        path, direct = self._shards[shard].path, self._open(shard)[1]
        start = offset % PAGE
        wanted = -(-(start + nbytes) // PAGE) * PAGE
        done = 0
        if direct is not None and wanted <= len(view) and not self._is_cached(path, offset, nbytes):
            try:
                done = os.preadv(direct, [view[:wanted]], offset - start)
            except OSError as error:
                if self._direct_io:
                    raise CheckpointError(
                        f"{path}: direct I/O failed: {error.strerror}; direct_io=None or False reads through the page "
                        "cache"
                    ) from error
        if done <= start:
            self.read_into(shard, view[:nbytes], offset)
            return 0
        if done < start + nbytes:  # interrupted
            self._read_into(shard, view[done : start + nbytes], offset - start + done)
        if self._checks is not None:
            self._checks.add(shard, offset, view[start : start + nbytes])
        return start

    def _is_cached(self, path: Path, offset: int, nbytes: int) -> bool:
        """Return True if the page cache holds this run of a file that it holds in part, and that may be looked up."""
        return self._direct_io is None and cached_share(path, offset, nbytes, RUN_WINDOWS) >= CACHED

    def _open(self, shard: int) -> tuple[int, int | None]:
        with self._lock:
            path = self._shards[shard].path
            if self._closed:
                raise CheckpointError(f"{path}: is read no more")
            if shard not in self._buffered:
                self._shards[shard].check_unchanged()
                self._read.add(shard)
                if shard not in self._direct:
                    self._direct[shard] = self._open_direct(self._shards[shard])
                try:
                    self._buffered[shard] = _open_same(self._shards[shard])
                except OSError as error:
                    raise CheckpointError(f"{path}: can't be opened: {reason(error)}") from error
            return self._buffered[shard], self._direct[shard]

    def _open_direct(self, shard: Shard) -> int | None:
        path = shard.path
        if self._direct_io is False or (self._direct_io is None and cached_share(path) >= CACHED):
            return None
        try:
            return _open_same(shard, os.O_DIRECT)
        except (OSError, AttributeError) as error:  # a file system, or an operating system, without
            if self._direct_io:
                raise CheckpointError(
                    f"{path}: can't be opened for direct I/O ({error}); direct_io=None or False reads through the "
                    "page cache"
                ) from error
            return None

    @classmethod
    def of(cls, checkpoint: Checkpoint, direct_io: bool | None = False, checks: Checks | None = None) -> Files:
        """The files of a checkpoint."""
        return cls(checkpoint.shards, direct_io, checkpoint.stored.values(), checks)

    def close(self) -> None:
        """Close all; whoever reads afterwards gets an error."""
        with self._lock:
            self._closed = True
            descriptors = [*self._buffered.values(), *self._direct.values()]
            self._buffered.clear()
            self._direct.clear()
            close_all(descriptor for descriptor in descriptors if descriptor is not None)

    def check_unchanged(self) -> None:
        """Raise if a shard that was read is no longer the file that was opened.

        Where digests are compared, the rest of what was read in part is read for it.
        """
        if self._checks is not None:
            buffer = memoryview(bytearray(_REST_BYTES))
            for info, start, stop in self._checks.rest():
                for at in range(start, stop, _REST_BYTES):
                    self.read_into(info.shard, buffer[: min(_REST_BYTES, stop - at)], info.offset + at)
        for shard in self._read:
            self._shards[shard].check_unchanged()


def _open_same(shard: Shard, flags: int = 0) -> int:
    """A descriptor of the very file whose header was read: its path may lead to another by now, or to a pipe."""
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    try:
        shard.check_is(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def cached_share(path: Path, start: int = 0, nbytes: int | None = None, windows: int = _WINDOWS) -> float:
    """About how much of a file, or of a part of it, the page cache holds: 0 to 1, and 1 where that can't be told."""
    with contextlib.suppress(OSError, ValueError):
        before = start % mmap.ALLOCATIONGRANULARITY
        length = 0 if nbytes is None else before + nbytes  # 0: to the end
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start - before) as mapped,
        ):
            pages = np.frombuffer(mapped, dtype=np.uint8)
            try:
                return _resident_share(int(pages.ctypes.data), len(mapped), windows)
            finally:
                del pages  # or the mapping could not be closed
    return 1.0


def _resident_share(address: int, nbytes: int, windows: int) -> float:
    length = min(_WINDOW_BYTES, nbytes)
    step = max(1, (nbytes - length) // (windows - 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    resident = seen = 0
    for start in range(0, nbytes - length + 1, step):
        found = resident_pages(address + start, length)
        resident += sum(page & 1 for page in found)
        seen += len(found)
    return resident / seen
