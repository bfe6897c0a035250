"""The memory that this process can still have, and what limits it: the machine, a container, or ``ulimit``.

What does not fit is refused before it begins, with figures: a process that a kernel kills says nothing. What is asked
is what is free at the moment; whoever else takes memory meanwhile is not foreseen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import DeviceError
from .text import human_bytes

_CGROUPS, _PROC = Path("/sys/fs/cgroup"), Path("/proc")
#: address space that the C library reserves for each thread's small allocations
_ARENA_BYTES = 64 << 20
#: of a thread, where its limit is infinite
_STACK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that one limit leaves to this process."""

    nbytes: int
    limit: str  # in words
    swap_bytes: int = 0  # and so many that go to disk first
    #: what threads reserve counts, be it used or not
    counts_address_space: bool = False


def rooms() -> Iterator[Room]:
    """What each limit leaves. There is none where it can't be told."""
    swap_bytes = 0
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = _table(_PROC / "meminfo")
        swap_bytes = found.get("SwapFree", 0) << 10
        yield Room(found["MemAvailable"] << 10, "this machine has free", swap_bytes)
    for folder, words in _cgroups():
        with contextlib.suppress(OSError, ValueError):  # "max", where there is no limit
            yield _room_of_cgroup(folder, words, swap_bytes)
    yield from _rooms_of_process()


def available_bytes() -> int:
    """Memory that programs, or the page cache, can have without swapping, as Linux reckons; 0 where it can't be told.

    Within a container, no more than its limit leaves.
    """
    return min((room.nbytes for room in rooms() if not room.counts_address_space), default=0)


def require(needed_bytes: int, threads: int, subject: object, advice: str) -> None:
    """Raise unless so much memory can be had beside what so many threads reserve.

    Raises:
        DeviceError: it can't; says how much is needed, how much there is, and what limits it.
    """
    _check(rooms(), needed_bytes, threads, subject, advice)


def require_thread(name: str) -> None:
    """Raise a `DeviceError` unless there is address space for one more thread.

    Python waits for ever for a thread that was started and has no memory to begin.
    """
    _check(_rooms_of_process(), 0, 1, f"thread {name}", "Ask for fewer threads (threads=1), or raise the limit.")


def _check(found: Iterable[Room], needed_bytes: int, threads: int, subject: object, advice: str) -> None:
    for room in found:
        needed = needed_bytes + (threads * _reserved_bytes() if room.counts_address_space else 0)
        if needed > room.nbytes + room.swap_bytes:
            raise DeviceError(
                f"{subject}: needs {human_bytes(needed)} of memory, and {room.limit} "
                f"{human_bytes(max(0, room.nbytes + room.swap_bytes))}. {advice}"
            )


def _table(file: Path) -> dict[str, int]:
    """A file of names and numbers."""
    pairs = (line.replace(":", "").split()[:2] for line in file.read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


# -- containers -------------------------------------------------------------------------------------------------------


def _cgroups() -> Iterator[tuple[Path, str]]:
    """This process's control groups for memory and all that they lie in, and how to speak of each."""
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            # a container sees its own as the root, whatever path it is told
            for part in (path, *map(str, Path(path).parents)):
                yield root / part.lstrip("/"), f"its control group {part} has left"


def _room_of_cgroup(folder: Path, words: str, swap_bytes: int) -> Room:
    """What a control group leaves, of version 2 or 1. What caches files is given back when memory is asked for."""
    stat = _table(folder / "memory.stat")
    if (folder / "memory.max").exists():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        cached = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        with contextlib.suppress(OSError, ValueError):
            swap = _number(folder / "memory.swap.max") - _number(folder / "memory.swap.current")
            swap_bytes = min(swap_bytes, max(0, swap))
    else:
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        cached = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    return Room(max(0, limit - max(0, used - cached)), words, swap_bytes)


def _number(file: Path) -> int:
    return int(file.read_text())


# -- ulimit -----------------------------------------------------------------------------------------------------------


def _rooms_of_process() -> Iterator[Room]:
    with contextlib.suppress(ImportError, OSError, KeyError):
        import resource

        status = _table(_PROC / "self" / "status")
        for limit, used, option in (
            (resource.RLIMIT_AS, "VmSize", "-v"),
            (resource.RLIMIT_DATA, "VmData", "-d"),
        ):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY:
                words = f"the limit of this process (ulimit {option}) leaves"
                yield Room(max(0, most - (status[used] << 10)), words, counts_address_space=True)


def _reserved_bytes() -> int:
    """Address space that a thread takes before it does anything."""
    import resource

    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _ARENA_BYTES + (_STACK_BYTES if stack == resource.RLIM_INFINITY else stack)
