"""Threads that are counted, so that no call ends before those that it started.

A thread that outlives its call would read into memory that is another's by then, or rename a file of the next run.
``Thread.join`` does not prevent that: up to CPython 3.12, an interrupt within it marks a thread that runs as ended.
So threads count themselves, as the first and the last thing they do.

An interrupt may come between any two steps of the thread that waits. Therefore nothing here is a `threading.Condition`
or an `Event`: an interrupt while one is entered leaves it locked for ever. A plain lock in a ``with`` is safe.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from ..machine import now
from ..memory import require_thread
from ..text import remark

#: how long `Workers.finish` waits before it says for what
PATIENCE_S = 5.0
_TICK_S, _MOMENT_S = 0.5, 1e-4


def _nothing() -> None:
    pass


class Workers:
    """Some threads, and how many of them are at work.

    Args:
        what: what they do, for whoever has to wait for a disk that does not answer: "reading /models/qwen".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._lock = threading.Lock()
        self._closed = False
        self._made: list[threading.Thread] = []
        self._begun: list[threading.Thread] = []
        self._ended = 0
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._process = os.getpid()
        self._waiting_since: float | None = None
        self._told = False

    def start(self, work: Callable[[], None], name: str) -> None:
        """Let a thread do ``work``, which handles its errors itself. Raises what starting it raises."""
        require_thread(name)
        thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._made.append(thread)
        thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:  # `start` was interrupted, and nobody waits for this one
                return
            self._begun.append(threading.current_thread())
        try:
            work()
        finally:
            with self._lock:
                self._ended += 1
            self._news.put(None)

    @property
    def at_work(self) -> int:
        """How many have begun and not ended."""
        return len(self._begun) - self._ended

    def wait(self, seconds: float) -> None:
        """Block until one of them ends, or for so many seconds."""
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=seconds)

    def finish(self, stop: Callable[[], None] = _nothing) -> BaseException | None:
        """Let no more begin, tell them to ``stop``, and wait until all have ended, whatever is pressed meanwhile.

        Returns:
            The first exception that came meanwhile, as of Ctrl-C: the caller's to raise.
        """
        first: BaseException | None = None
        try:
            while True:
                try:
                    if self._elsewhere():
                        return first
                    with self._lock:
                        self._closed = True
                    stop()
                    self._wait_for_all()
                    return first
                except BaseException as error:
                    first = first or error
        finally:  # its traceback holds this frame
            del first

    def _elsewhere(self) -> bool:
        """Return True in a process that was forked meanwhile, which has no such threads, and in one of them."""
        return os.getpid() != self._process or threading.current_thread() in self._begun

    def _wait_for_all(self) -> None:
        self._waiting_since = self._waiting_since or now()
        # when the interpreter ends, threads do no more, not even count
        while self.at_work and not sys.is_finalizing():
            if not self._told and now() - self._waiting_since > PATIENCE_S:
                self._told = True
                remark(self._telling())
            self.wait(_TICK_S)
        # all that is left to them is to go; after an interrupted `join`, the next one does not wait
        since = now()
        while not sys.is_finalizing() and any(self._goes(thread, since) for thread in threading.enumerate()):
            time.sleep(_MOMENT_S)

    def _goes(self, thread: threading.Thread, since: float) -> bool:
        """Return True if it is one of these. One whose start was interrupted may be listed for ever, and never be."""
        return thread in self._begun or (thread in self._made and now() - since < _TICK_S)

    def _telling(self) -> str:
        threads = "1 thread" if self.at_work == 1 else f"{self.at_work} threads"
        return (
            f"octavo: waiting for {threads} {self.what}. The call ends when the disk has answered. To give up, end the "
            "process: what is finished is kept."
        )
