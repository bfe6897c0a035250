"""How the demonstration looks: plain text of at most 80 columns, the same in a log as on a terminal.

Only headings differ: on a terminal they are bold, unless ``NO_COLOR`` is set.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from typing import TextIO

from ..streaming.meter import Sample
from ..text import human_bytes

_WIDEST = 80
_HEIGHT = 7
# a cell, filled by so many eighths; the second where the output's encoding has no such characters
_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = "     ####"


class Screen:
    """Writes text as it comes, or nothing where there is no output.

    An answer comes in words, through `write`: lines are broken before the edge, and begin below one another.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self.width = max(40, min(_WIDEST, shutil.get_terminal_size((_WIDEST, 0)).columns))
        self._indent = self._column = 0
        self._space = ""  # what separates the next word from the last

    def say(self, text: str = "") -> None:
        """Write lines as they are."""
        self.end_line()
        self._put(text + "\n")

    def heading(self, text: str) -> None:
        """Write a line that begins a section, after an empty one."""
        bold = self._out is not None and self._out.isatty() and not os.environ.get("NO_COLOR")
        self.say(f"\n\x1b[1m{text}\x1b[0m" if bold else f"\n{text}")

    def begin(self, label: str) -> None:
        """Begin a line whose words are to follow."""
        self.end_line()
        self._put(label)
        self._indent = self._column = len(label)

    def write(self, text: str) -> None:
        """Write words, and line breaks where there are some between them."""
        for piece in re.findall(r"\s+|\S+", text):
            if piece.isspace():
                self._space += piece
                continue
            breaks = self._space.count("\n")
            if not breaks and self._column + bool(self._space) + len(piece) > self.width:
                breaks = 1
            if breaks:
                self._put("\n" * breaks + " " * self._indent)
                self._column = self._indent
            elif self._space and self._column > self._indent:
                piece = " " + piece
            self._put(piece)
            self._column += len(piece)
            self._space = ""

    def end_line(self) -> None:
        """End the line that words were written to, so that what comes next begins a line of its own."""
        if self._column:
            self._put("\n")
        self._indent = self._column = 0
        self._space = ""

    def flush(self) -> None:
        """There is nothing to do: all is written at once."""

    def curve(self, trace: Sequence[Sample], source_bytes: int, final_bytes: int) -> str:
        """Draw the bytes in place over time: they rise, and stay under the line of the unquantized model."""
        began = next((s.at_s for s in trace if s.placed_bytes), 0.0)
        samples = [s for s in trace if s.at_s >= began]
        if not samples:
            return ""
        width = self.width - 15
        span_s = max(samples[-1].at_s - began, 1e-9)
        columns = [0] * width
        for sample in samples:
            columns[min(width - 1, int((sample.at_s - began) / span_s * width))] = sample.placed_bytes
        for i in range(1, width):  # of moments between two samples
            columns[i] = max(columns[i], columns[i - 1])
        top = source_bytes / _HEIGHT
        final = min(_HEIGHT - 1, int(final_bytes / top))  # the row that the model ends in
        lines = [f"{human_bytes(source_bytes):>12} {' the model, unquantized ':-^{width}}"]
        for row in reversed(range(_HEIGHT)):
            cells = (min(8, max(0, round((value / top - row) * 8))) for value in columns)
            label = human_bytes(final_bytes) if row == final else ""
            lines.append(f"{label:>12} {''.join(self._blocks[cell] for cell in cells)}".rstrip())
        lines.append(f"{'0 B':>12} {'-' * width}")
        lines.append(f"{'0 s':>16}{f'{span_s:.2f} s':>{width - 3}}")
        return "\n".join(lines)

    @property
    def _blocks(self) -> str:
        try:
            _BLOCKS.encode(getattr(self._out, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return _ASCII
        return _BLOCKS

    def _put(self, text: str) -> None:
        if self._out:
            self._out.write(text)
            self._out.flush()
