"""This machine, asked: its devices, compilers, cores, clock, pages and cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib.util
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._guards import detect_fake_mode

from .errors import DeviceError
from .text import shown

# Triton compiles a little C for each kernel, too
_COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
HAS_TRITON = importlib.util.find_spec("triton") is not None and _COMPILER is not None


def usable_device(device: str | torch.device, *, begin: bool = True) -> torch.device:
    """The device, with its number, once it is known that tensors can be on it; a `DeviceError` otherwise.

    Args:
        begin: begin to use it, which takes a third of a second on a GPU; else only look whether there is one.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no weights")
        # counting does not begin to use any (is_available does)
        there = found.type == "cuda" and torch.cuda.device_count() > (found.index or 0)
        if found.type != "cpu" and (begin or not there):
            return torch.empty(1, device=found).device
        if there and found.index is None:  # each thread has a current device of its own: say which is meant
            return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    # some kinds are packages of their own
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DeviceError(f"device {shown(str(device))} can't be used here: {reason}") from error
    return found


def on_cpu(device: str) -> bool:
    """Return True for a device, by its name, whose memory is the host's."""
    return device.partition(":")[0] == "cpu"


def require_values() -> None:
    """Raise a `DeviceError` where the program has torch make tensors that hold no values."""
    if detect_fake_mode() is not None:
        raise DeviceError("a FakeTensorMode is active, in which no tensor holds weights: leave it, then call octavo")


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """Meanwhile this thread makes tensors as if the program had set nothing: on the CPU, and to be changed by anyone.

    Raises:
        DeviceError: there is a `FakeTensorMode`.
    """
    require_values()
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.inference_mode(False), torch.device("cpu") if elsewhere else contextlib.nullcontext():
        yield


Maker = TypeVar("Maker", bound=Callable[..., Any])


def in_memory(make: Maker) -> Maker:
    """Have a function that makes tensors once for all make them on the CPU, and to be used by anyone.

    Whoever happens to come first may have set a default device, as transformers does while it makes a model.
    """

    @functools.wraps(make)
    def made(*args: Any) -> Any:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*args)

    return made  # type: ignore[return-value]


def usable_cpus() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


#: what reads and writes past the page cache are aligned to, in files and in memory; devices ask for no more
PAGE = 4096


def resident_pages(address: int, nbytes: int) -> bytes:
    """A byte for each page of mapped memory, from a page's beginning: its lowest bit says whether the page is there.

    Raises:
        OSError: the system does not tell.
    """
    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, TypeError):  # not on Windows
        raise OSError(errno.ENOSYS, "no mincore") from None
    if mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(pages)


def cache_root() -> Path:
    """Where octavo keeps what it can make again: `$OCTAVO_CACHE`, else `octavo` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    if own := os.environ.get("OCTAVO_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "octavo"
    return Path.home() / ".cache" / "octavo"


def now() -> float:
    """The clock of all stage timings, in seconds."""
    return time.perf_counter()


def rss_bytes() -> int:
    """Resident set size of this process as the operating system sees it; 0 where it can't be asked."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
