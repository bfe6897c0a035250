"""Memory, seconds and progress, watched while a stream runs."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import of_user
from ..machine import now, on_cpu, rss_bytes
from ..text import human_bytes, on_terminal, remark
from .workers import Workers

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from .stream import Tally


_SAMPLE_S = 0.01
#: a longer trace is thinned to half, and sampled half as often
_MAX_SAMPLES = 2048


class Stages:
    """Seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - started


#: the thread that has paused the garbage collector
_pauser: int | None = None


def _resume_elsewhere() -> None:
    """In a forked process, whose only thread is the one that forked: the collector goes on if another had paused it."""
    if _pauser not in (None, threading.get_ident()):
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_resume_elsewhere)


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Without Python's cyclic garbage collector.

    The many small objects of a plan make it pass again and again over all that is in memory, a third of a second each
    time beside vLLM. What loading makes holds no cycles. Nor is it passed over at the end, with the model code that has
    been imported meanwhile (0.1 s): it counts as old, and waits for the next full collection. A collection that is
    asked for meanwhile, as vLLM does twice a load, looks only at what has been made since this began.
    """
    global _pauser
    was_enabled = gc.isenabled()
    gc.disable()
    if was_enabled:
        _pauser = threading.get_ident()
    freezing = was_enabled and not gc.get_freeze_count()  # what others have frozen stays so
    if freezing:
        gc.freeze()
    try:
        yield
    finally:
        if freezing:
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            _pauser = None
            gc.enable()


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at one moment."""

    at_s: float
    placed_bytes: int  # written to their final place so far
    rss_bytes: int  # of the process, over what it was when the trace began
    device_bytes: int  # allocated on accelerators, over what it was when the trace began


class Meter:
    """Samples memory in a thread of its own while a stream runs; also drives the progress bar."""

    def __init__(self, devices: Iterable[str], progress: Callable[[int, int], None] | None) -> None:
        self.progress = progress
        self.samples: list[Sample] = []
        self.peaks: dict[str, int] = {}  # accelerator -> the most bytes that were allocated there, as in `Sample`
        self._devices = {name: torch.device(name) for name in devices}
        self._tally: Tally | None = None
        self._stop: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._began, self._rss = now(), rss_bytes()
        self._allocated = {name: _allocated_bytes(device) for name, device in self._devices.items()}
        self._workers = Workers("that measure memory")

    def start(self) -> None:
        """Begin to sample; `close` must follow, whatever this raises."""
        self._workers.start(self._run, "octavo-meter")

    def follow(self, tally: Tally) -> None:
        """Trace the bytes that are placed."""
        self._tally = tally

    def close(self) -> None:
        """End the thread, and take a last sample."""
        interrupt = self._workers.finish(lambda: self._stop.put(None))
        self._sample()
        try:
            if interrupt is not None:
                raise interrupt
        finally:
            del interrupt

    def _run(self) -> None:
        interval_s = _SAMPLE_S
        while self._goes_on(interval_s):
            self._sample()
            if len(self.samples) >= _MAX_SAMPLES:
                # the largest of each pair, so that peaks stay
                pairs = zip(self.samples[::2], self.samples[1::2], strict=False)
                self.samples = [max(pair, key=lambda s: (s.rss_bytes, s.device_bytes)) for pair in pairs]
                interval_s *= 2

    def _goes_on(self, seconds: float) -> bool:
        """Wait so long; False as soon as the meter is closed."""
        try:
            self._stop.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def _sample(self) -> None:
        placed = self._tally.placed_bytes if self._tally else 0
        on_devices = 0
        for name, device in self._devices.items():
            nbytes = _allocated_bytes(device) - self._allocated[name]
            self.peaks[name] = max(nbytes, self.peaks.get(name, 0))
            on_devices += nbytes
        self.samples.append(Sample(now() - self._began, placed, rss_bytes() - self._rss, on_devices))


def _allocated_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    # as `torch.cuda.memory_allocated`, which flattens all statistics first, a hundred times a second
    statistics: Any = torch.cuda.memory_stats_as_nested_dict(device)
    return int(statistics["allocated_bytes"]["all"]["current"]) if statistics else 0


@contextlib.contextmanager
def measured(plan: Plan, progress: bool | Callable[[int, int], None] | None, title: str = "Loading") -> Iterator[Meter]:
    """A `Meter` around a stream; with a progress bar where ``progress`` says so (see `octavo.load`)."""
    with progress_bar(progress, title) as callback:
        meter = Meter([device for device in plan.devices if not on_cpu(device)], callback)
        try:
            meter.start()
            yield meter
        finally:
            meter.close()


@contextlib.contextmanager
def progress_bar(
    progress: bool | Callable[[int, int], None] | None, title: str
) -> Iterator[Callable[[int, int], None] | None]:
    """Turn what users give as ``progress`` into a callback: theirs, that of a bar on stderr, or None."""
    if callable(progress):
        yield of_user(progress)
        return
    if progress is False or (progress is None and not on_terminal()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def said_meanwhile(progress: bool | Callable[[int, int], None] | None, what: str) -> Iterator[None]:
    """A line on stderr, for as long as nothing can be counted, where there would be a bar (see `progress_bar`)."""
    if callable(progress) or progress is False or (progress is None and not on_terminal()):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class ProgressLines:
    """Progress where there is no terminal: a line to stderr every ten seconds."""

    def __init__(self, title: str, every_s: float = 10.0) -> None:
        self._title, self._every_s = title, every_s
        self._told: float | None = None  # counted from the first bytes: what goes before may be long, too

    def __call__(self, done: int, total: int) -> None:
        if self._told is None:
            self._told = now()
        if now() - self._told >= self._every_s:
            self._told = now()
            remark(f"{self._title}: {human_bytes(done)} of {human_bytes(total)}")
