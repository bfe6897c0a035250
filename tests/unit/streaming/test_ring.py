"""The ring: threads that end, whatever happens, and files that are closed."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from contextlib import closing

import pytest

from helpers import threads_of_octavo
from octavo.streaming.ring import Cancelled, Ring, Slot

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(30)]


class Recorder:
    """Makes workers that note their tickets and whether they were closed."""

    def __init__(self, handle=lambda ticket: None, close=lambda: None) -> None:
        self.tickets: list[int] = []
        self.made: list[str] = []
        self.closed: list[str] = []
        self._handle, self._close = handle, close

    def __call__(self):
        recorder = self

        class Worker:
            def handle(self, ticket: int) -> int:
                recorder.tickets.append(ticket)
                recorder._handle(ticket)
                return 10

            def close(self) -> None:
                recorder.closed.append(threading.current_thread().name)
                recorder._close()

        recorder.made.append(threading.current_thread().name)
        return Worker()


def fail_at(number: int, error: BaseException):
    def handle(ticket: int) -> None:
        if ticket == number:
            raise error

    return handle


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_ticket_is_handled_once(threads):
    ring, workers, ticks = Ring(threads), Recorder(), []
    ring.run(iter(range(1, 101)), workers, ticks.append)
    assert sorted(workers.tickets) == list(range(1, 101))
    assert ring.done_bytes == 1000
    assert ticks[-1] == 1000
    assert ticks == sorted(ticks)
    assert len(workers.made) == threads
    assert sorted(workers.closed) == sorted(workers.made)  # each in its own thread
    assert not ring.running


def test_one_thread_takes_tickets_in_order():
    workers = Recorder()
    Ring(1).run(range(1, 50), workers)
    assert workers.tickets == list(range(1, 50))


def test_tickets_are_drawn_by_one_thread_at_a_time():
    drawing = threading.Lock()

    def tickets():
        for number in range(1, 200):
            assert drawing.acquire(blocking=False)
            time.sleep(0.0001)
            drawing.release()
            yield number

    workers = Recorder()
    Ring(5).run(tickets(), workers)
    assert sorted(workers.tickets) == list(range(1, 200))


def test_no_tickets_are_no_work():
    workers = Recorder()
    Ring(3).run([], workers)
    assert workers.tickets == []
    assert len(workers.closed) == 3


@pytest.mark.parametrize("threads", [1, 4])
def test_an_exception_in_a_worker_reaches_the_caller_after_all_threads_have_ended(threads):
    workers = Recorder(fail_at(5, ValueError("at five")))
    with pytest.raises(ValueError, match="at five"):
        Ring(threads).run(range(1, 100_000), workers)
    assert threads_of_octavo() == []
    assert len(workers.closed) == threads
    assert len(workers.tickets) < 99_999  # the others stopped


def test_an_exception_while_drawing_tickets_reaches_the_caller():
    def tickets():
        yield 1
        raise ValueError("no more tickets")

    workers = Recorder()
    with pytest.raises(ValueError, match="no more tickets"):
        Ring(3).run(tickets(), workers)
    assert workers.tickets == [1]
    assert len(workers.closed) == 3


def test_an_exception_while_making_a_worker_reaches_the_caller():
    def make():
        raise MemoryError("no slots")

    with pytest.raises(MemoryError, match="no slots"):
        Ring(3).run(range(1, 10), make)


def test_an_exception_while_closing_a_worker_reaches_the_caller():
    def close():
        raise ValueError("the copy had failed")

    with pytest.raises(ValueError, match="the copy had failed"):
        Ring(2).run(range(1, 10), Recorder(close=close))


def test_the_first_error_wins():
    def close():
        raise ValueError("afterwards")

    with pytest.raises(KeyError, match="first"):
        Ring(1).run(range(1, 10), Recorder(fail_at(3, KeyError("first")), close))


def test_ctrl_c_in_the_caller_ends_all_threads():
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    workers = Recorder(lambda ticket: time.sleep(0.001))
    with pytest.raises(KeyboardInterrupt):
        Ring(4).run(range(1, 10_000_000), workers, interrupt)
    assert threads_of_octavo() == []
    assert len(workers.closed) == 4
    assert 0 < len(workers.tickets) < 9_999_999


def test_ctrl_c_ends_threads_that_wait():
    ring = Ring(3)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    def tickets():
        yield 1
        ring.wait_for(lambda: False)  # a sink with no room
        yield 2

    workers, started = Recorder(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ring.run(tickets(), workers, interrupt)
    assert workers.tickets == [1]
    assert time.monotonic() - started < 3  # woken, not timed out


def test_a_worker_that_waits_is_cancelled_when_another_fails():
    ring, waiting, outcome = Ring(2), threading.Event(), []

    def handle(ticket: int) -> None:
        if ticket == 1:
            waiting.set()
            try:
                ring.wait_for(lambda: False)
            except Cancelled:
                outcome.append("cancelled")
                raise
        else:
            assert waiting.wait(10)
            raise ValueError("the other one")

    with pytest.raises(ValueError, match="the other one"):
        ring.run([1, 2], Recorder(handle))
    assert outcome == ["cancelled"]


def test_a_worker_waits_until_another_makes_its_condition_true():
    ring, ready = Ring(2), []

    def handle(ticket: int) -> None:
        if ticket == 1:
            ring.wait_for(lambda: bool(ready))
            ready.append("waited")
        else:
            time.sleep(0.05)
            ring.update(lambda: ready.append("changed"))

    ring.run([1, 2], Recorder(handle))
    assert ready == ["changed", "waited"]


def test_stopping_a_ring_in_the_background_ends_its_threads():
    ring, workers = Ring(3), Recorder(lambda ticket: time.sleep(0.001))
    ring.start(range(1, 10_000_000), workers)
    while not workers.tickets:
        time.sleep(0.001)
    assert ring.running
    ring.finish()
    assert not ring.running
    assert len(workers.closed) == 3


def test_a_failed_ring_raises_once():
    ring = Ring(2)
    ring.start(range(1, 10), Recorder(fail_at(1, ValueError("failed"))))
    with pytest.raises(ValueError, match="failed"):
        ring.finish()
    ring.finish()


# -- relay: threads read, the caller consumes -------------------------------------------------------------------------


def relay(ring: Ring, tickets, read=lambda ticket, slot: 10, consume=lambda *_: None, slots: int = 3):
    """Returns the tickets in the order in which they were consumed."""
    consumed = []

    with closing(ring.relay(tickets, [Slot(16, pinned=False) for _ in range(slots)], read)) as arriving:
        for ticket, slot in arriving:
            consume(ticket, slot)
            consumed.append(ticket)
    return consumed


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_a_relay_hands_over_in_order_what_was_read_into_each_slot(threads, slots):
    def read(ticket: int, slot: Slot) -> int:
        time.sleep(0.0005 * (ticket % 3))  # later ones may be ready first
        slot.buffer[0] = ticket
        return 10

    seen, ring = [], Ring(threads)

    def consume(ticket: int, slot: Slot) -> None:
        seen.append(int(slot.buffer[0]))

    assert relay(ring, range(1, 101), read, consume, slots) == list(range(1, 101))
    assert seen == list(range(1, 101))
    assert ring.done_bytes == 1000


def test_a_relay_of_nothing_ends():
    assert relay(Ring(3), []) == []


@pytest.mark.parametrize("slots", [1, 20])
def test_an_exception_of_a_reader_reaches_the_caller_of_a_relay(slots):
    def read(ticket: int, slot: Slot) -> int:
        if ticket == 5:
            raise ValueError("at five")
        return 10

    with pytest.raises(ValueError, match="at five"):
        relay(Ring(4), range(1, 100_000), read, slots=slots)


@pytest.mark.parametrize("slots", [1, 20])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_of_the_consumer_ends_the_readers(slots, error):
    def consume(ticket: int, slot: Slot) -> None:
        if ticket == 5:
            raise error

    with pytest.raises(error):
        relay(Ring(4), range(1, 100_000), consume=consume, slots=slots)


def test_an_exception_while_drawing_tickets_ends_a_relay():
    def tickets():
        yield 1
        raise ValueError("no more tickets")

    with pytest.raises(ValueError, match="no more tickets"):
        relay(Ring(3), tickets())


@pytest.mark.parametrize("consumed", [3, 100])
def test_a_relay_that_has_ended_holds_nothing_that_only_the_collector_would_free(consumed):
    """Memory of a device is not what makes Python collect garbage."""

    class Owner:
        def read(self, ticket: int, slot: Slot) -> int:
            return 10

    ring, owner, slots = Ring(2), Owner(), [Slot(16, pinned=False) for _ in range(8)]
    held = [weakref.ref(thing) for thing in (ring, owner, *slots)]
    gc.collect()
    gc.disable()
    try:
        with closing(ring.relay(range(100), slots, owner.read)) as arriving:
            assert sum(1 for _ in itertools.islice(arriving, consumed)) == consumed
        del ring, owner, slots, arriving
        assert [reference() for reference in held if reference() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["run", "relay"])
def test_a_failure_that_is_over_holds_nothing_that_only_the_collector_would_free(way):
    class Owner:
        def fail(self, *_) -> int:
            raise ValueError("at once")

        def __call__(self):
            return Worker(self)

    class Worker:
        def __init__(self, owner: Owner) -> None:
            self.handle = owner.fail

        def close(self) -> None:
            del self.handle

    ring, owner = Ring(2), Owner()
    held = [weakref.ref(ring), weakref.ref(owner)]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="at once") as raised:
            ring.run(range(9), owner) if way == "run" else relay(ring, range(9), owner.fail)
        del ring, owner, raised
        assert [reference() for reference in held if reference() is not None] == []
    finally:
        gc.enable()


def test_a_slot_waits_once_for_its_event():
    class Event:
        count = 0

        def synchronize(self) -> None:
            self.count += 1

    slot, event = Slot(16, pinned=False), Event()
    slot.busy = event
    slot.wait()
    slot.wait()
    assert event.count == 1
    assert len(slot.view) == 16


def test_ctrl_c_while_threads_start_leaves_none_behind(monkeypatch):
    start, started = threading.Thread.start, []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 3:
            raise KeyboardInterrupt  # as when it comes while `start` waits

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Ring(5).run(iter(range(100_000)), Recorder(lambda _: time.sleep(0.001)))
    assert len(started) == 3
    for thread in started:
        thread.join(10)  # the third may begin only now, and do nothing
    assert not any(thread.is_alive() for thread in started)
