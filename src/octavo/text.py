"""Words for people: bytes, tables as text, and what others wrote, made fit for a terminal."""

from __future__ import annotations

import contextlib
import re
import reprlib
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

#: of a line that is told, in characters; and what is kept of the end of a longer one
_MAX_LINE, _END = 2000, 300
#: what a terminal obeys, but for line breaks and tabs
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def human_bytes(count: float) -> str:
    """12345678 -> '11.77 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    raise AssertionError


def count_text(counted: tuple[int, int]) -> str:
    """(tensors, bytes) -> '12 tensors, 3.00 MiB'."""
    return f"{counted[0]:,} tensor{'s' * (counted[0] != 1)}, {human_bytes(counted[1])}"


def pattern(name: str) -> str:
    """'model.layers.3.mlp' -> 'model.layers.*.mlp', which all of a model's layers have in common."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


# -- on stderr --------------------------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """Return True if stderr is a terminal, and False where a program has none, or has closed it."""
    with contextlib.suppress(AttributeError, ValueError):
        return sys.stderr.isatty()
    return False


def remark(line: str) -> None:
    """Print a line to stderr. Where nobody can read it any more, as after a terminal was closed, nothing fails."""
    if sys.stderr is not None:  # `print` would take stdout
        with contextlib.suppress(AttributeError, OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


# -- what others wrote ------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    r"""A name, or any text of others, on one line that a terminal only shows: ``a\x1b[2J`` for what would clear it.

    Escaped is whatever Python does not call printable: control characters, line breaks, marks that turn the direction
    of text, halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def prose(text: str) -> str:
    """A text of others with its line breaks, and with joined emoji and directions of writing, but no control codes."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """A text as one `printable` line, the middle left out where it is very long."""
    safe = printable(text)
    if len(safe) <= _MAX_LINE:
        return safe
    return f"{safe[: _MAX_LINE - _END]} [... {len(safe) - _MAX_LINE:,} characters ...] {safe[-_END:]}"


def told(error: BaseException) -> str:
    """What an exception of others says, with its class, as one line."""
    return " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())


_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxlist, _shown.maxdict, _shown.maxtuple = 3, 8, 8, 8
_shown.maxstring, _shown.maxlong, _shown.maxother = 160, 40, 160


def shown(value: Any) -> str:
    """A value that a file or a user gave, in one line: what `repr` makes of it, shortened where that is long."""
    return _shown.repr(value)


def some(names: Sequence[str], last: str = "and", most: int = 3) -> str:
    """A few names as a list in a sentence, and how many there are beside them."""
    named = [*names[:most], *([f"{len(names) - most:,} more"] if len(names) > most else [])]
    return f" {last} ".join([", ".join(named[:-1]), named[-1]]) if named[1:] else "".join(named)


# -- tables -----------------------------------------------------------------------------------------------------------


def table_text(title: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]], *, heading: bool = True) -> str:
    """A table as lines of plain text.

    Args:
        columns: heading -> "left" or "right", where its cells are.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=heading)
    for name, justify in columns.items():
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # never as markup, which names may look like
    # as wide as the terminal; 140 columns where there is none
    width = min(140, shutil.get_terminal_size((140, 0)).columns)
    output = StringIO()
    Console(file=output, width=width, color_system=None).print(table)
    # a title of the table's own would be broken where the table ends
    return "\n".join([printable(title), *(line.rstrip() for line in output.getvalue().rstrip().splitlines())])
