"""What the command line says: results to stdout, all else to stderr, and every name only as a terminal can show it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import OutputError, boundary
from .text import on_terminal, printable, prose

if TYPE_CHECKING:
    from .streaming.report import Report


@contextlib.contextmanager
def _writing() -> Iterator[Any]:
    """Stdout, whose failures are errors: a result that nobody got was not given."""
    with boundary("standard output", OutputError):
        if sys.stdout is None:
            raise OutputError("standard output: closed")
        yield sys.stdout
        sys.stdout.flush()


def say(text: str) -> None:
    """One line of a result, which may hold names."""
    with _writing() as out:
        out.write(printable(text) + "\n")


def say_lines(text: str) -> None:
    """A table, or other lines that octavo made."""
    for line in text.splitlines():
        say(line)


def say_json(value: Any) -> None:
    with _writing() as out:
        out.write(json.dumps(value, indent=2) + "\n")


def say_written(report: Report, dst: Path, as_json: bool) -> None:
    """The report of a conversion. Where it can't be written, it is told that the folder is complete nevertheless."""
    try:
        if as_json:
            say_json(report.to_dict())
        else:
            say_lines(report.table())
            say(f"written: {dst}")
    except OutputError:
        tell("", "", f"{dst} is complete")
        raise


class Spoken:
    """What a model says, word by word: on a terminal without control codes, and as it is where a program reads it."""

    def write(self, text: str) -> None:
        with _writing() as out:
            out.write(prose(text) if out.isatty() else text)

    def flush(self) -> None:
        """Nothing waits: each word is written at once."""


def progress_of(title: str) -> Any:
    """A bar on a terminal, lines elsewhere: whoever reads a log wants to know that it goes on."""
    from .streaming.meter import ProgressLines

    return None if on_terminal() else ProgressLines(title)


def tell(label: str, style: str, text: str) -> None:
    """Print to stderr, a label in a style and lines behind it; where there is no stderr, nothing."""
    from rich.console import Console
    from rich.text import Text

    lines = "\n".join(map(printable, text.splitlines()))
    with contextlib.suppress(OSError):
        console = Console(stderr=True, highlight=False)
        console.print(Text.assemble((f"{label}: ", style) if label else "", lines), soft_wrap=True)


def complain(text: str, cause: BaseException | None) -> int:
    """Tell an error, unless it is that nobody reads any more, as after ``| head``; returns the exit code."""
    if isinstance(cause, BrokenPipeError):
        return 128 + signal.SIGPIPE  # as of programs that the signal ends
    tell("error", "red", text)
    return 2


def tell_fault(error: BaseException) -> None:
    """Say that octavo is at fault, and what whoever mends it needs to know."""
    where = "".join(traceback.format_exception(error))
    version = f"octavo {__version__}, Python {sys.version.split()[0]}, {sys.platform}"
    tell("", "", where)
    plea = f"this is a fault of octavo, not of what it was given ({version}). Please report it with the lines above."
    tell("error", "red", plea)


def give_up_output() -> None:
    """Let Python not try once more, when it ends, to write what could not be written, and fail then."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_output() -> None:
    """Let characters that a terminal lacks be shown as escapes, and no file be what others take for stdout or stderr.

    Where these are closed, the next files that are opened would get their numbers, and what libraries print.
    """
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
