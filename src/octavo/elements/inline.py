"""Work that is given to a pool of threads, done at once by the thread that gives it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


@contextlib.contextmanager
def pools_inline() -> Iterator[None]:
    """Have pools of threads do within ``submit`` what this thread submits; what others submit is done as ever.

    A mode that follows tensors is of one thread, and sees nothing of what others do for it.
    """
    submit, mine = ThreadPoolExecutor.submit, threading.get_ident()

    def submit_inline(self: ThreadPoolExecutor, act: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if threading.get_ident() != mine:
            return submit(self, act, *args, **kwargs)
        done: Future[Any] = Future()
        try:
            done.set_result(act(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done

    ThreadPoolExecutor.submit = submit_inline  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ThreadPoolExecutor.submit = submit  # type: ignore[method-assign]
