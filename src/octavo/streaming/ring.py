"""The bounded reader: threads that read into slots, in pinned memory for an accelerator.

A fixed number of threads take tickets (chunks on a CPU, parts of blocks on an accelerator) in the order given, and read
them into a fixed number of equal slots. So memory is bounded whatever the sizes of tensors, and the earliest ticket
always has a slot. There are two ways:

- `Ring.run`: each thread owns a slot, and goes on with the chunk itself while the bytes are in its core's cache;
- `Ring.relay`: the threads only read, and the calling thread, which owns the slots, takes over in order.

A slot is reused only when it is idle: on an accelerator, after the copy out of it has completed.

`Ring.stop` wakes whatever waits: an exception in any thread, or Ctrl-C in the caller's, stops every worker after its
current chunk, and waits for them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..machine import PAGE
from .workers import Workers

Ticket = TypeVar("Ticket")
TicketIn = TypeVar("TicketIn", contravariant=True)
#: how often a waiting caller looks for Ctrl-C and reports progress
TICK_S = 0.1


class Cancelled(Exception):
    """Raised in a worker whose ring was stopped by another thread; never reaches a user."""


class SingleThreadedTorch:
    """While any is held, threads of a ring use one torch thread each; afterwards all is as it was.

    Torch has the setting for each thread, and what one thread sets is what threads started later begin with.
    """

    _lock = threading.Lock()
    _holders = 0
    _before = 1
    _held = False

    def hold(self) -> None:
        with self._lock:
            if self._held:
                return
            if not SingleThreadedTorch._holders:
                SingleThreadedTorch._before = torch.get_num_threads()
            # both or none, should Ctrl-C come
            SingleThreadedTorch._holders += 1
            self._held = True

    def release(self) -> None:
        with self._lock:
            if not self._held:
                return
            self._held = False
            SingleThreadedTorch._holders = max(0, SingleThreadedTorch._holders - 1)
            if not SingleThreadedTorch._holders:
                torch.set_num_threads(SingleThreadedTorch._before)

    @classmethod
    def begin_anew(cls) -> None:
        """In a forked process: rings that held it, and threads that were about to, are not here."""
        cls._lock = threading.Lock()
        if cls._holders:
            cls._holders = 0
            torch.set_num_threads(cls._before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SingleThreadedTorch.begin_anew)


class Slot:
    """A host buffer, and the event of a device after which it may be overwritten."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        # said, since whoever calls may have made another device the default (``with torch.device("cuda")``)
        self.buffer: Tensor = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.view = memoryview(self.buffer.numpy())  # type: ignore[arg-type]
        self.events: dict[torch.device, Any] = {}  # made when first needed; each belongs to one device
        self.busy: Any = None  # the event, until it has been waited for
        self.start = 0  # the bytes that were asked for begin here
        self.aligned = not self.buffer.data_ptr() % PAGE

    @property
    def idle(self) -> bool:
        """Return True if the slot may be overwritten: the copy out of it has completed."""
        return self.busy is None or bool(self.busy.query())

    def wait(self) -> None:
        """Block until it may be overwritten."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None


class Worker(Protocol[TicketIn]):
    """The work of one thread of the ring. It is made inside the thread, and given one ticket after another."""

    def handle(self, ticket: TicketIn) -> int:
        """Do the work of one ticket; returns the bytes that count as progress."""

    def close(self) -> None:
        """Called once, in the thread, after its last ticket (also after an error)."""


class Ring(Generic[Ticket]):
    """Threads that work off tickets in order. Use `run`, or `start` and `finish` around a consumer of one's own."""

    def __init__(self, threads: int, what: str = "at work") -> None:
        self._count = threads
        self.workers = Workers(what)
        # entered by its lock: an interrupt within the condition's own `__enter__` would leave it locked
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._alive = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._on_stop: Callable[[], None] = lambda: None  # wakes what does not wait on the condition
        self.done_bytes = 0

    def start(self, tickets: Iterable[Ticket], make_worker: Callable[[], Worker[Ticket]]) -> None:
        """Start the threads; ``tickets`` is advanced by one thread at a time, and may block in `wait_for`."""
        iterator, turn = iter(tickets), threading.Lock()

        def draw() -> Ticket | None:
            with turn:
                return None if self._stopping else next(iterator, None)

        self._start(draw, make_worker)

    def _start(self, draw: Callable[[], Any], make_worker: Callable[[], Worker[Any]]) -> None:
        """Start the threads; each calls ``draw`` for its next ticket, until that is None."""
        self._alive = self._count
        for number in range(self._count):
            self.workers.start(lambda: self._work(draw, make_worker), f"octavo-{number}")

    def run(
        self,
        tickets: Iterable[Ticket],
        make_worker: Callable[[], Worker[Ticket]],
        on_tick: Callable[[int], None] | None = None,
    ) -> None:
        """Work off all tickets; raises the first error of any thread, after all threads have ended."""
        try:
            self.start(tickets, make_worker)
            while self._alive:
                self.workers.wait(TICK_S)
                if on_tick:
                    on_tick(self.done_bytes)
        finally:
            self.finish()
        if on_tick:
            on_tick(self.done_bytes)

    def relay(
        self, tickets: Iterable[Ticket], slots: Sequence[Slot], read: Callable[[Ticket, Slot], int]
    ) -> Generator[tuple[Ticket, Slot], None, None]:
        """Threads ``read`` tickets into slots (returning bytes read); yields tickets and their slots, in order.

        The calling thread gives slots to tickets in their order, so the next one to be yielded always has one; a slot
        is free again when the next ticket is asked for and the device has copied it. Threads do nothing but read, and
        the calling thread all else: a dozen that cut tickets, or wait for the device, leave it no turn to launch.
        Close the generator (`contextlib.closing`) to end the threads; errors as for `run`.
        """
        todo: queue.SimpleQueue[tuple[int, Ticket, Slot] | None] = queue.SimpleQueue()
        full: queue.SimpleQueue[tuple[int, Ticket, Slot, int] | None] = queue.SimpleQueue()
        threads = self._count

        def no_more() -> None:  # knows not this ring, which would hold itself and what waits in the queue
            for _ in range(threads):
                todo.put(None)

        self._on_stop = no_more
        numbered, free = enumerate(tickets), deque(slots)
        waiting: dict[int, tuple[Ticket, Slot, int]] = {}
        copying: deque[Slot] = deque()
        expected, ended, drawn = 0, 0, False
        try:
            self._start(todo.get, lambda: _Reader(read, full))
            while ended < self._count or waiting:
                while copying and copying[0].idle:
                    free.append(copying.popleft())
                while free and not drawn:
                    if (following := next(numbered, None)) is not None:
                        todo.put((*following, free.popleft()))
                    else:
                        drawn = True
                        no_more()
                if expected in waiting:
                    what, slot, nbytes = waiting.pop(expected)
                    yield what, slot
                    copying.append(slot)
                    self.done_bytes += nbytes
                    expected += 1
                elif ended == self._count:
                    break  # a reader failed: `finish` raises its error
                elif copying and full.empty():
                    copying[0].wait()
                else:
                    arrived = full.get()
                    if arrived is None:
                        ended += 1
                    else:
                        waiting[arrived[0]] = arrived[1:]
        finally:
            self.finish()

    def finish(self) -> None:
        """Stop, wait until all threads have ended, and raise the first error of any of them."""
        interrupt = self.workers.finish(self.stop)
        self._alive = 0
        first, self._error = self._error or interrupt, None
        try:
            if first is not None:
                raise first
        finally:  # the traceback holds what was streamed: nothing here may hold it, too
            del first, interrupt

    def stop(self, error: BaseException | None = None) -> None:
        """Let every thread end after its current chunk."""
        with self._lock:
            self._stopping = True
            if self._error is None:
                self._error = error
            self._on_stop()
            self._condition.notify_all()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Block until ``predicate`` holds; `Cancelled` when the ring is stopped meanwhile."""
        with self._lock:
            self._condition.wait_for(lambda: self._stopping or predicate())
            if self._stopping and not predicate():
                raise Cancelled

    def update(self, change: Callable[[], None]) -> None:
        """Change what a `wait_for` predicate reads, and wake the waiting."""
        with self._lock:
            change()
            self._condition.notify_all()

    @property
    def running(self) -> bool:
        """Return True while any thread works."""
        return self._alive > 0

    def _work(self, draw: Callable[[], Any], make_worker: Callable[[], Worker[Any]]) -> None:
        worker: Worker[Any] | None = None
        try:
            worker = make_worker()
            while not self._stopping and (ticket := draw()) is not None:
                count = worker.handle(ticket)
                with self._lock:
                    self.done_bytes += count
        except Cancelled:
            pass
        except BaseException as error:
            self.stop(error)
        finally:
            try:
                if worker is not None:
                    worker.close()
            except BaseException as error:
                self.stop(error)
            with self._lock:
                self._alive -= 1
                self._condition.notify_all()


class _Reader(Generic[Ticket]):
    """A thread of `Ring.relay`. (A class made there would hold itself, and ``read``, until Python collects garbage.)"""

    def __init__(
        self,
        read: Callable[[Ticket, Slot], int],
        full: queue.SimpleQueue[tuple[int, Ticket, Slot, int] | None],
    ) -> None:
        self._read, self._full = read, full

    def handle(self, ticket: tuple[int, Ticket, Slot]) -> int:
        number, what, slot = ticket
        self._full.put((number, what, slot, self._read(what, slot)))
        return 0

    def close(self) -> None:
        self._full.put(None)
