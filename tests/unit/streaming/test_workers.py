"""Threads that are waited for, whatever is pressed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from octavo.streaming import workers as module
from octavo.streaming.workers import Workers

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(30)]


class Sender:
    """Sends signals to the main thread from another one, when it has been told to begin."""

    def __init__(self, count: int, number: int = signal.SIGINT) -> None:
        self.begin, self.sent = threading.Event(), threading.Event()
        self._count, self._number = count, number
        self._main = threading.main_thread().ident
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.begin.wait()
        for _ in range(self._count):
            time.sleep(0.02)
            assert self._main is not None
            signal.pthread_kill(self._main, self._number)
        time.sleep(0.02)
        self.sent.set()


@pytest.fixture
def sender() -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(*args: int) -> Sender:
        made.append(Sender(*args))
        return made[-1]

    yield make
    for one in made:
        one.begin.set()
        one.thread.join()


def test_threads_are_waited_for_however_many_interrupts_come(sender):
    workers, ended, sending = Workers("at work"), [], sender(5)

    def work() -> None:
        sending.sent.wait()
        time.sleep(0.02)
        ended.append(1)

    for number in range(3):
        workers.start(work, f"octavo-{number}")
    assert isinstance(workers.finish(sending.begin.set), KeyboardInterrupt)
    assert len(ended) == 3
    assert workers.at_work == 0


def test_what_another_signal_s_handler_raises_is_no_less_an_interrupt(sender):
    def late(*_):
        raise TimeoutError("too late")

    before = signal.signal(signal.SIGUSR1, late)
    try:
        workers, ended, sending = Workers("at work"), [], sender(2, signal.SIGUSR1)
        workers.start(lambda: (sending.sent.wait(), ended.append(1)), "octavo-0")
        assert isinstance(workers.finish(sending.begin.set), TimeoutError)
        assert ended == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_those_that_work_are_told_to_stop_and_without_interrupt_nothing_is_returned():
    workers, told = Workers("at work"), threading.Event()
    workers.start(lambda: told.wait() and None, "octavo-0")
    assert workers.finish(told.set) is None
    assert workers.finish(told.set) is None


def test_thread_that_begins_when_nobody_waits_for_it_does_nothing():
    workers, ended = Workers("at work"), []
    workers.finish()
    workers.start(lambda: ended.append(1), "octavo-0")
    workers.finish()
    assert ended == []


def test_thread_that_raises_is_counted(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    workers = Workers("at work")
    workers.start(lambda: 1 // 0 and None, "octavo-0")
    assert workers.finish() is None


def test_thread_does_not_wait_for_itself():
    workers, found = Workers("at work"), []
    workers.start(lambda: found.append(workers.finish()), "octavo-0")
    assert workers.finish() is None
    assert found == [None]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    workers, go_on = Workers("at work"), threading.Event()
    workers.start(lambda: go_on.wait() and None, "octavo-0")
    child = os.fork()
    if not child:
        signal.alarm(10)
        workers.finish()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    workers.finish(go_on.set)


def test_who_waits_long_hears_once_for_what(monkeypatch, capsys, sender):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    monkeypatch.setattr(module, "_TICK_S", 0.02)
    workers, told, telling = Workers("reading /models/qwen"), threading.Event(), Workers._telling

    def tell(workers: Workers) -> str:
        told.set()
        return telling(workers)

    monkeypatch.setattr(Workers, "_telling", tell)
    sending = sender(3)
    workers.start(lambda: told.wait() and sending.sent.wait() and None, "octavo-0")
    workers.finish(sending.begin.set)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        "octavo: waiting for 1 thread reading /models/qwen. The call ends when the disk has answered."
    )
