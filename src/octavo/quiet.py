"""Keeping what other libraries say off the screen while a command of octavo runs.

Importing transformers imports what it finds beside it, and some of that logs warnings and advice that concern nobody
who only wanted an answer. This is for the command line alone: the library never changes how others log or warn.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_OTHERS = r"(?!octavo(\.|$))"  # as `warnings` matches it: the module that a warning is about


@contextlib.contextmanager
def others_quiet() -> Iterator[None]:
    """Hide log records up to WARNING, and the warnings of modules other than octavo's; at the end all is as before.

    Errors are shown, whoever logs them, and so are octavo's own warnings. Whoever asks Python for warnings (``-W``,
    ``PYTHONWARNINGS``) gets them.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=_OTHERS)
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


_muting = threading.Lock()


class _Muted:
    """Standard error without what one thread writes to it."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def this_thread_quiet() -> Iterator[None]:
    """Hide what this thread writes to standard error: bars that others draw, and give no way to switch off."""
    with _muting:
        before = sys.stderr
        sys.stderr = _Muted(before, threading.get_ident())
        try:
            yield
        finally:
            sys.stderr = before


@contextlib.contextmanager
def loguru_quiet(package: str) -> Iterator[None]:
    """Hide what a package logs by loguru, which neither of the others reaches, if it has been imported."""
    logger = getattr(sys.modules.get("loguru"), "logger", None)
    if logger is None:
        yield
        return
    logger.disable(package)
    try:
        yield
    finally:
        logger.enable(package)
