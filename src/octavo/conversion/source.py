"""Whether a source is what it was when a conversion was interrupted: told by a few reads, never by its name.

Of each shard, the manifest holds its size, its time of modification, and a digest of its header and of a few samples
of its weights. Where these are the same, shards that are finished are kept, wherever the source lies by now: a copy
that keeps its times goes on. Where one differs, the source is another one, and is refused. A file that is where it was
and has been touched since, though its time of modification is the same, may hold anything between the samples: what
was made from it is written again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import conforms, open_regular
from ..checkpoint.header import Shard, TensorInfo
from ..errors import SourceChangedError, reason

#: of a shard: so many of its tensors, and so much of each
_SAMPLES, _SAMPLE_BYTES = 16, 4096
#: of a shard, in the manifest: nbytes, mtime_ns and digest; inode and ctime_ns
Marks = dict[str, list[Any]]


def marks_of(checkpoint: Checkpoint) -> Marks:
    """Marks of each shard, by its name.

    Raises:
        SourceChangedError: a shard is not the one whose header was read, or can't be read any more.
    """
    return {
        shard.path.name: [
            *(shard.nbytes, shard.identity.mtime_ns, _digest(shard, mine)),
            *(shard.identity.inode, shard.identity.ctime_ns),
        ]
        for shard, mine in zip(checkpoint.shards, checkpoint.by_shard(), strict=True)
    }


def difference(then: Any, now: Marks) -> str | None:
    """What tells that a source is another one, given the marks in a manifest and those of today; None if nothing."""
    if not conforms(then, dict[str, list[Any]]) or any(len(marks) != 5 for marks in then.values()):
        return "it was begun by another version of octavo"
    for name in sorted({*then, *now}):
        if name not in then or name not in now:
            return f"{name} is {'new' if name in now else 'gone'}"
        for what, old, new in zip(("size", "time of modification", "content"), then[name], now[name], strict=False):
            if old != new:
                return f"{name} has another {what}"
    return None


def touched(then: Marks, now: Marks) -> set[str]:
    """Shards that are the same files as then, and were touched since: written to, or only renamed or linked."""
    return {name for name in now if then[name][3] == now[name][3] and then[name][4] != now[name][4]}


def moved(then: Marks, now: Marks) -> set[str]:
    """Shards that are other files than then, as copies are: no more is known of them than what was sampled."""
    return {name for name in now if then[name][3] != now[name][3]}


def _digest(shard: Shard, tensors: Iterable[TensorInfo]) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(shard.path) as file:
            descriptor = file.fileno()
            shard.check_is(os.fstat(descriptor))
            prefix = os.pread(descriptor, 8, 0)
            digest.update(prefix + file.read(8 + int.from_bytes(prefix, "little")))
            for info in _sampled(tensors):
                count = min(_SAMPLE_BYTES, info.nbytes)
                digest.update(os.pread(descriptor, count, info.offset + (info.nbytes - count) // 2))
            shard.check_is(os.fstat(descriptor))
    except OSError as error:
        raise SourceChangedError(f"{shard.path}: can't be read any more: {reason(error)}") from error
    return digest.hexdigest()


def _sampled(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    """A few tensors, always the same, scattered over layers and kinds; norms, which training hardly moves, last."""

    def order(info: TensorInfo) -> tuple[bool, bytes]:
        hashed = hashlib.sha256(info.name.encode(errors="surrogatepass")).digest()
        return len(info.shape) < 2 or not info.quantizable, hashed

    chosen = sorted((info for info in tensors if info.nbytes), key=order)[:_SAMPLES]
    return sorted(chosen, key=lambda info: info.offset)
