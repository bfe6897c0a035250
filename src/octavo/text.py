"""Words for people: bytes, tables as text, and what others wrote, made fit for a terminal."""

from __future__ import annotations

import reprlib
import shutil
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


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


_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxlist, _shown.maxdict, _shown.maxtuple = 3, 8, 8, 8
_shown.maxstring, _shown.maxlong, _shown.maxother = 160, 40, 160


def shown(value: Any) -> str:
    """A value that a file or a user gave, in one line: what `repr` makes of it, shortened where that is long."""
    return _shown.repr(value)


def to_text(table: Table) -> str:
    """A table as lines of plain text."""
    # as wide as the terminal; 140 columns where there is none
    width = min(140, shutil.get_terminal_size((140, 0)).columns)
    output = StringIO()
    Console(file=output, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
