"""Entries of the cache folder: what is remembered of a plan, under a name that says what it is one of.

They are the user's alone, and what others may have written, is damaged or belongs elsewhere is not read. There are so
many at most, of so many bytes; those that were used last stay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint.files import open_regular, parse_json
from ...machine import cache_root

#: of the folder; the ones that were used last stay
_MAX_ENTRIES, _MAX_BYTES = 64, 1 << 29
_MAX_ENTRY_BYTES = 1 << 28
#: after which what a process has begun to write is no longer waited for
_ABANDONED_S = 3600
#: of an entry, and of one that is being written
_NAME = re.compile(r"[0-9a-f]{64}(\.\w+)?$")


def path_of(name: str) -> Path:
    """Where the entry of that name is, which is a digest.

    Raises:
        RuntimeError: the user has no home.
    """
    return cache_root() / "plans" / name


def read(path: Path) -> dict[str, Any]:
    """What an entry holds.

    Raises:
        FileNotFoundError: there is none.
        Exception: whatever comes of files that were written by who knows whom.
    """
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        if not _is_own(status):
            raise ValueError("others may have written it")
        if status.st_size > _MAX_ENTRY_BYTES:
            raise ValueError(f"it has {status.st_size:,} bytes, more than are ever written")
        raw = file.read(_MAX_ENTRY_BYTES)
    checksum, _, text = raw.partition(b"\n")
    if _checksum(path, text) != checksum:
        raise ValueError("it is damaged, or another one")
    with contextlib.suppress(OSError):
        os.utime(path)  # it is used
    found: dict[str, Any] = parse_json(text, unique=False)
    return found


def _checksum(path: Path, text: bytes) -> bytes:
    """That of an entry, and of what it is one of, which its name tells."""
    return hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest().encode()


def keep(path: Path, content: Mapping[str, Any]) -> None:
    """Write an entry, and remove what is too much.

    Raises:
        OSError: it can't be written; or it is too large, or in a folder of others, who could lead what is written or
            removed there elsewhere.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(path.parent)
    if not (stat.S_ISDIR(status.st_mode) and _is_own(status)):
        raise PermissionError(errno.EPERM, "it is no folder that this user alone may write to", str(path.parent))
    write(path, content)
    _prune(path.parent)


def _is_own(status: os.stat_result) -> bool:
    """Return True for what this user has made, and nobody else may write to."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write an entry: all of it or nothing, whoever else writes it meanwhile."""
    text = json.dumps(content, separators=(",", ":")).encode()
    raw = _checksum(path, text) + b"\n" + text
    if len(raw) > _MAX_ENTRY_BYTES:  # which `read` would find damaged
        raise OSError(errno.EFBIG, f"a plan of {len(raw):,} bytes is not kept", str(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # which only this user may read
    try:
        with open(descriptor, "wb") as file:
            file.write(raw)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _prune(folder: Path) -> None:
    """Remove what has not been used for longest, where there is too much; nothing that has other names than entries."""
    entries, nbytes = [], 0
    for item in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            if _NAME.match(item.name) and item.is_file(follow_symlinks=False):
                entries.append((item.stat().st_mtime, item.stat().st_size, item))
    complete = [found for found in entries if "." not in found[-1].name]
    for number, (_, size, item) in enumerate(sorted(complete, key=lambda found: -found[0])):
        nbytes += size
        if number >= _MAX_ENTRIES or nbytes > _MAX_BYTES:
            _remove(item)
    for modified, _, item in entries:
        if "." in item.name and time.time() - modified > _ABANDONED_S:
            _remove(item)


def _remove(item: os.DirEntry[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(item)
