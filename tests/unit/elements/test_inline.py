"""Work for pools of threads, done by the thread that submits it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest

from octavo.elements.inline import pools_inline


def test_work_is_done_at_once_by_the_thread_that_submits_it():
    with ThreadPoolExecutor() as pool:
        with pools_inline():
            done = [pool.submit(threading.get_ident), *map(pool.submit, [threading.get_ident] * 2)]
            assert all(future.done() for future in done)
            assert {future.result() for future in as_completed(done)} == {threading.get_ident()}
            assert set(pool.map(lambda _: threading.get_ident(), "ab")) == {threading.get_ident()}
        assert pool.submit(threading.get_ident).result() != threading.get_ident()


def test_what_other_threads_submit_is_done_by_their_pool():
    with ThreadPoolExecutor(1) as outer, ThreadPoolExecutor(1) as inner:
        submitting = outer.submit(threading.get_ident).result()  # before: its thread is another one
        work = threading.Event()

        def submit() -> int:
            work.wait()
            return inner.submit(threading.get_ident).result()

        found = outer.submit(submit)
        with pools_inline():
            work.set()
            assert found.result() not in (submitting, threading.get_ident())


def test_errors_are_of_the_future_and_pools_are_as_before():
    submit = ThreadPoolExecutor.submit

    def fail():
        raise KeyError("x")

    with ThreadPoolExecutor() as pool, pools_inline():
        future = pool.submit(fail)
        with pytest.raises(KeyError):
            future.result()
    assert ThreadPoolExecutor.submit is submit
