"""What users can mend is told in a line of its own, before vLLM tells where each of its processes was when it ended."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from vllm.logger import init_logger

from ...errors import OctavoError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
# below vLLM's own loggers, so that its settings hold for ours
log = init_logger("vllm.octavo")


def telling(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Have a function log an `OctavoError`, and raise it without what led to it: vLLM prints it in three processes."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except OctavoError as error:
            log.debug("octavo: where it happened", exc_info=True)
            log.error("octavo: %s", error)
            told = error
        raise told.with_traceback(None) from None

    return call
