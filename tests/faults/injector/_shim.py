"""The shim that makes calls of the C library fail: compiled here, controlled from within."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
#: in the order of the enumerations in shim.c
KINDS = ("open", "read", "write", "sync", "close", "rename", "stat", "mkdir", "unlink", "allocate", "lock", "list")
KINDS += ("map", "thread", "memory")
WAYS = ("no", "before", "after", "short", "zero")


def why_not() -> str | None:
    """Why this machine can't have a shim; None where it can."""
    if not sys.platform.startswith("linux"):
        return "LD_PRELOAD is Linux's"
    return None if shutil.which("cc") else "there is no C compiler (cc)"


def compiled(folder: Path) -> Path:
    """The shim, built into ``folder``."""
    shim = folder / "shim.so"
    command = ["cc", "-Wall", "-Wextra", "-Werror", "-O2", "-shared", "-fPIC", "-o", shim, SOURCE, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return shim


class Shim:
    """The shim that this process was started with."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.shim_arm.argtypes = [ctypes.c_char_p, *[ctypes.c_int], *[ctypes.c_long] * 2, *[ctypes.c_int] * 2]
        self._library.shim_count.restype = ctypes.c_long
        self._library.shim_struck.restype = ctypes.c_char_p

    @contextlib.contextmanager
    def armed(
        self, folder: Path, kind: str | None, way: str = "no", error: int = 0, nth: int = 1, times: int = 1
    ) -> Iterator[None]:
        """Let the ``nth`` call of a kind below ``folder``, and ``times`` in all, go wrong; None only counts."""
        number = -1 if kind is None else KINDS.index(kind)
        self._library.shim_arm(bytes(folder), number, nth, times, WAYS.index(way), error)
        try:
            yield
        finally:
            self._library.shim_disarm()

    def counts(self) -> dict[str, int]:
        """Calls of each kind since arming."""
        return {kind: self._library.shim_count(number) for number, kind in enumerate(KINDS)}

    @property
    def struck(self) -> str:
        """The first call that went wrong, as ``function path``; empty if none has."""
        found: bytes = self._library.shim_struck()
        return found.decode(errors="replace")
