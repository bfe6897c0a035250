"""What users can mend is told in a line of its own, before an engine tells where its processes were when they ended."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ...errors import OctavoError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Telling:
    """Decorates functions: they log an `OctavoError`, and raise it without what led to it.

    Args:
        log: below the engine's own loggers, so that its settings hold.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def __call__(self, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except OctavoError as error:
                self._log.debug("octavo: where it happened", exc_info=True)
                self._log.error("octavo: %s", error)
                told = error
            raise told.with_traceback(None) from None

        return call
