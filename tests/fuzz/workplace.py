"""Where fuzzers put their files: in memory if there is a file system for it, since each input is written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    parent = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
