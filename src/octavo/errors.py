"""Every error that a user can cause.

    OctavoError
    ├── CheckpointError      the source can't be read as a safetensors checkpoint
    │   └── SourceChangedError   it changed while it was being read, or since an interrupted run
    ├── RecipeError          an unknown scheme, an ambiguous or unmatched pattern, an option that can't be honoured
    ├── CoverageError        checkpoint and model don't fit: missing, unexpected, misshapen tensors
    ├── WeightError          a weight that can't be quantized (non-finite values)
    ├── LoaderError          a weight loader does what can't be followed box by box
    ├── UpdateError          an update in place failed midway; says which layers are new, which old
    ├── OutputError          the target exists, is not ours, or can't be written (disk full)
    ├── DeviceError          a device that isn't there, or too small a budget
    └── MissingExtraError    an optional package is not installed

Messages say what happened, where, and what to do. Whatever is found in one step is reported in one message: see
``raise_problems``. What Python, the system and torch raise because of what they were given becomes one of these at a
``boundary``: there is one around each public function, and a narrower one, ``reading``, where a file is parsed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

from .text import one_line

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Lines(str):
    """A message of several lines, each of which is fit for a terminal."""

    @classmethod
    def of(cls, *thoughts: str) -> Lines:
        """A line for each thought."""
        return cls("\n".join(map(one_line, thoughts)))


class OctavoError(Exception):
    """Base of every error that a user can cause.

    A message is one line, whatever names it holds; only that of `Lines` is more.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message if isinstance(message, Lines) else one_line(message))


class CheckpointError(OctavoError):
    """The source can't be read as a safetensors checkpoint."""


class SourceChangedError(CheckpointError):
    """The source changed while it was being read, or since an interrupted run began."""


class RecipeError(OctavoError):
    """A recipe that is unknown, ambiguous, or can't be honoured on this checkpoint."""


class CoverageError(OctavoError):
    """The checkpoint's tensors and the model's parameters don't cover each other exactly."""


class WeightError(OctavoError):
    """A weight that can't be quantized."""


class LoaderError(OctavoError):
    """A weight loader does what can't be followed: reads before it writes, writes no boxes, writes after the end."""


class UpdateError(OctavoError):
    """An update in place failed midway. Running the whole update again heals.

    ``new`` layers hold the update's weights, ``old`` ones those of before, ``torn`` ones some of both.
    """

    def __init__(self, message: str, new: Sequence[str], old: Sequence[str], torn: Sequence[str]) -> None:
        super().__init__(message)
        self.new, self.old, self.torn = tuple(new), tuple(old), tuple(torn)


class OutputError(OctavoError):
    """The output can't be written."""


class DeviceError(OctavoError):
    """A device is absent, or a memory budget too small."""


class MissingExtraError(OctavoError):
    """An optional dependency is missing; the text holds the exact command that installs it."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs packages that are not installed: pip install 'octavo[{extra}]'")
        self.extra = extra


MAX_PROBLEMS_SHOWN = 50


def raise_problems(error: type[OctavoError], subject: object, problems: Sequence[str], advice: str = "") -> None:
    """Raise ``error`` with all ``problems`` in one message; do nothing when there are none."""
    if not problems:
        return
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        lines = [f"{subject}: {shown[0]}"]
    else:
        lines = [f"{subject}: {len(problems)} problems", *(f"  - {line}" for line in shown)]
    raise error(Lines.of(*lines, *([advice] if advice else [])))


# -- errors of others -------------------------------------------------------------------------------------------------

#: what can be done, where the system's own words leave that open
_ADVICE = {
    errno.EMFILE: "this process may open no more files: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "the system can open no more files: close some",
    errno.EIO: "the disk, or the network on the way to it, fails: copy the file elsewhere, or fetch it again",
    errno.ESTALE: "the server has another file there by now: run again when nothing writes to it",
}


def reason(error: OSError) -> str:
    """The system's words, and what can be done."""
    words = error.strerror or str(error) or type(error).__name__
    return f"{words}: {_ADVICE[error.errno]}" if error.errno in _ADVICE else words


@contextlib.contextmanager
def boundary(
    subject: object, kind: type[OctavoError] = OctavoError, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn what others raise because of what they were given into an `OctavoError`, and let all else pass.

    Octavo's own errors pass, and so does what a function of the user raised: see `passes`.

    Args:
        subject: what is being worked on: the file, the checkpoint.
        kind: the class of errors that are about it.
        also: exceptions that mean, here and nowhere else, that the subject is not as it should be.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OctavoError) or passes(error):
            raise
        found = _translated(error, subject, kind, also)
        if found is None:
            raise
        raise found from error


def _translated(
    error: Exception, subject: object, kind: type[OctavoError], also: tuple[type[Exception], ...]
) -> OctavoError | None:
    text = next(iter(str(error).splitlines()), "")
    # torch has no class for the host's memory
    if isinstance(error, MemoryError) or "allocate memory" in text or type(error).__name__ == "OutOfMemoryError":
        why = f" ({text})" if text else ""
        return DeviceError(f"{subject}: not enough memory{why}. A smaller staging_bytes, or fewer threads, need less.")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return DeviceError(
            f"{subject}: the system starts no more threads, {threading.active_count()} run here already. Ask for fewer "
            "(threads=1), or raise the limit (ulimit -u)."
        )
    if isinstance(error, OSError):
        named = error.filename  # a descriptor, where one was asked about
        where = os.fsdecode(named) if isinstance(named, (str, bytes)) else subject
        return kind(f"{where}: {reason(error)}")
    if isinstance(error, RecursionError):
        return kind(f"{subject}: nested too deeply to be read")
    if isinstance(error, (OverflowError, UnicodeError, *also)):
        return kind(f"{subject}: {text or type(error).__name__}")
    return None


def reading(path: object) -> contextlib.AbstractContextManager[None]:
    """A `boundary` around the code that parses a file: what can't be read, or is malformed, is a `CheckpointError`."""
    return boundary(path, CheckpointError, (ValueError,))


def public(kind: type[OctavoError]) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a public function with a `boundary`, whose subject is the first path among its arguments."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            paths = (given for given in (*args, *kwargs.values()) if isinstance(given, (str, os.PathLike)))
            with boundary(next(paths, f"octavo.{function.__name__}"), kind):
                return function(*args, **kwargs)

        return call

    return decorate


def passes(error: BaseException) -> bool:
    """Return True if a function of the user raised an error: one that is marked by `of_user`, or a handler of a signal.

    Such a handler, of an alarm for example, may run between any two steps of octavo.
    """
    if getattr(error, "of_user", False):
        return True
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()}
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _ in frames)


def of_user(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that a user gave: what it raises passes every `boundary` as it is."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            with contextlib.suppress(AttributeError, TypeError):  # a class may have no room for it
                error.of_user = True  # type: ignore[attr-defined]
            raise

    return call
