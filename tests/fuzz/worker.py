"""One process of a campaign: it makes the inputs that are its own by their numbers, and judges them.

What it has done stands in a file that the parent reads while it works, and from which another process goes on when this
one was killed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.machine import rss_bytes

from .oracle import FindingError, judge, place_of
from .targets import TARGETS, Target, make

#: memory that a process may ask for beyond what it has when it begins, so that an input can't bring down the machine
_MOST_BYTES = 4 << 30
#: seconds after which an input counts as one that hangs: of computing, or of waiting on a machine that is busy, too
_COMPUTING_SECONDS, _WAITING_SECONDS = 5, 30
#: examples that are kept of findings of one kind
_EXAMPLES = 3
#: rounds after which memory should not grow any more
_WARM_ROUNDS = 20
_FIELDS = ("peak_bytes", "warm_bytes", "last_bytes", "current")
_COUNTS = ("next", "accepted", "refused", "findings")


class Progress:
    """Numbers in a file that two processes share."""

    def __init__(self, path: Path) -> None:
        names = [*_FIELDS, *(f"{target}.{count}" for target in TARGETS for count in _COUNTS)]
        self._offsets = {name: 8 * number for number, name in enumerate(names)}
        if not path.exists():
            path.write_bytes(bytes(8 * len(names)))
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._map, self._offsets[name])[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._map, self._offsets[name], value)


class HangError(BaseException):
    """No Exception, so that nothing takes it for an error of the input's."""


@dataclass(frozen=True)
class Task:
    """What one process does: of ``totals`` inputs a target, those whose number leaves ``index`` modulo ``jobs``."""

    seed: int
    index: int
    jobs: int
    totals: Mapping[str, int]
    ends_at: float
    findings: str  # a folder
    folder: str  # for its files

    def work(self, progress: Progress) -> None:
        """Judge inputs until all are done, or the time is over."""
        torch.set_num_threads(1)
        signal.signal(signal.SIGALRM, _hang)
        signal.signal(signal.SIGPROF, _hang)
        log = _Log(Path(self.findings), self.index)
        place = Path(self.folder) / str(os.getpid())
        targets = {name: make(name, place) for name in self.totals}
        _limit_memory()
        rounds, busy = 0, True
        while busy and time.time() < self.ends_at:
            busy = sum(self._round(target, progress, log) for target in targets.values()) > 0
            rounds += 1
            progress["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            progress["last_bytes"] = rss_bytes()
            if rounds <= _WARM_ROUNDS:
                progress["warm_bytes"] = progress["last_bytes"]

    def _round(self, target: Target, progress: Progress, log: _Log) -> bool:
        """Judge a share of a target's inputs; return False if there are no more."""
        name = target.name
        for _ in range(target.share):
            turn = progress[f"{name}.next"]
            number = turn * self.jobs + self.index
            if number >= self.totals[name] or time.time() > self.ends_at:
                return number < self.totals[name]
            progress["current"] = number
            progress[f"{name}.next"] = turn + 1  # whoever goes on after a kill begins with the next one
            data = target.input(self.seed, number)
            try:
                verdict = "accepted" if _guarded(target, data) else "refused"
            except FindingError as finding:
                verdict = "findings"
                log.add(name, number, data, finding)
            progress[f"{name}.{verdict}"] += 1
        return True


def _guarded(target: Target, data: bytes) -> bool:
    signal.setitimer(signal.ITIMER_REAL, _WAITING_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, _COMPUTING_SECONDS)
    try:
        return judge(target, data)
    except HangError as hang:
        raise FindingError(f"hang {place_of(hang)}", f"no end after {_COMPUTING_SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _hang(*_: Any) -> None:
    raise HangError


class _Log:
    """Findings on the disk: a line each, and the inputs of the first few of a kind."""

    def __init__(self, folder: Path, index: int) -> None:
        self.folder, self.index = folder, index
        self.seen: Counter[tuple[str, str]] = Counter()

    def add(self, target: str, number: int, data: bytes, finding: FindingError) -> None:
        self.seen[target, finding.kind] += 1
        line: dict[str, Any] = {"target": target, "number": number, "kind": finding.kind, "text": finding.text}
        if self.seen[target, finding.kind] <= _EXAMPLES:
            file = self.folder / f"{target}-{number}"
            file.write_bytes(data)
            line["file"] = str(file)
        with open(self.folder / f"worker-{self.index}.jsonl", "a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(json.dumps(line) + "\n")


def main(text: str, progress: str) -> None:
    """Entry point of the process."""
    with contextlib.suppress(KeyboardInterrupt):
        Task(**json.loads(text)).work(Progress(Path(progress)))
