"""What may become of an input: octavo takes it, or refuses it by an error that can be shown. All else is a finding."""

from __future__ import annotations

import resource
import time
import traceback
from pathlib import Path

import typer

import octavo
from octavo import OctavoError

from .targets import Target

#: memory that one small input may take beyond what any took before it
_GROWTH_BYTES = 64 << 20
#: seconds of computing that one small input may take
_MOST_SECONDS = 2.0
#: lines of a message, and characters of a line
_MOST_LINES, _LONGEST_LINE = 60, 2_500
_SOURCES = Path(octavo.__file__).parent


class FindingError(Exception):
    """An input that broke a promise; ``kind`` is the same for inputs that broke it in the same way."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def judge(target: Target, data: bytes) -> bool:
    """Give an input to a target; return whether it was accepted, and raise a `FindingError` if a promise was broken."""
    peak, began = _peak_bytes(), time.thread_time()
    try:
        accepted = _outcome(target, data)
    finally:
        target.tidy()
    spent, grown = time.thread_time() - began, _peak_bytes() - peak
    if spent > _MOST_SECONDS:
        raise FindingError("slow", f"{spent:.1f} s of computing")
    if grown > _GROWTH_BYTES:
        raise FindingError("memory", f"{grown >> 20} MiB more than ever before")
    return accepted


def _outcome(target: Target, data: bytes) -> bool:
    try:
        target.run(data)
    except (OctavoError, typer.BadParameter) as error:
        problem = _unfit(str(error))
        if problem:
            raise FindingError(f"message {problem}", repr(str(error)[:500])) from error
        return False
    except AssertionError as error:
        # an assertion of a target, or one of octavo's own
        raise FindingError(_kind(error), str(error)[:2000]) from error
    except Exception as error:
        raise FindingError(_kind(error), str(error)[:500]) from error
    return True


def _unfit(message: str) -> str | None:
    """Why a message should not reach a terminal; None if it may."""
    lines = message.split("\n")
    if len(lines) > _MOST_LINES or max(map(len, lines)) > _LONGEST_LINE:
        return "is too long"
    if not all(line.isprintable() for line in lines):
        return "has characters that can't be printed"
    return None


def _kind(error: BaseException) -> str:
    """The class of an error, what an assertion says first, and where it came through."""
    said = str(error).partition(":")[0][:80] + " " if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__} {said}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """The last place in octavo, or in the target, that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_SOURCES)] or frames[-1:]
    return f"in {Path(own[-1].filename).name}: {own[-1].name}"


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
