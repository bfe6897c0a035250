"""Committed results of benchmarks, and the circumstances under which each figure was measured."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
MIB, GIB = 1 << 20, 1 << 30
SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8")

Row = Sequence[object]


@dataclass(frozen=True)
class Result:
    """One file of results: the figures of one benchmark on one kind of machine."""

    content: dict[str, Any]
    stem: str  # of its file, and of the names of its pictures

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """When -> circumstances. A file whose figures are all of one run holds them at its top."""
        found: dict[str, dict[str, Any]] = self.content.get("runs") or {self.content["date"]: self.content}
        return found

    @property
    def gpu(self) -> str:
        """'H100': which card, of whatever maker."""
        return str(next(iter(self.runs.values()))["machine"]["gpu"].split()[1])

    def __getitem__(self, key: str) -> Any:
        return self.content[key]


def load(name: str) -> list[Result]:
    """The results of a benchmark, one for each kind of machine that it ran on."""
    return [Result(json.loads(path.read_text()), path.stem) for path in sorted(RESULTS.glob(f"{name}-*.json"))]


@dataclass
class Sources:
    """The runs that the figures of one table come from, each with a letter by which rows name it."""

    result: Result
    used: list[str] = field(default_factory=list)

    def letter(self, row: dict[str, Any]) -> str:
        """The letter of the run that measured ``row``."""
        run = row.get("run") or next(iter(self.result.runs))
        if run not in self.used:
            self.used.append(run)
        return string.ascii_lowercase[self.used.index(run)]

    def note(self, more: str = "") -> str:
        """Machine, versions and runs, as a paragraph to stand below the table."""
        for run in self.used or self.result.runs:  # a table that names no runs is of all of them
            if run not in self.used:
                self.used.append(run)
        facts = [self.result.runs[run] for run in self.used]
        when = []
        for letter, run in zip(string.ascii_lowercase, self.used, strict=False):
            at = f"{run[:16].replace('T', ' ')} at commit `{self.result.runs[run]['commit']}`"
            when.append(at if len(self.used) == 1 else f"{letter}: {at}")
        parts = [
            f"Machine: {' / '.join(dict.fromkeys(machine(fact['machine']) for fact in facts))}",
            f"Versions: {versions(fact['versions'] for fact in facts)}" + (f"; {more}" if more else ""),
            f"{'Runs' if len(when) > 1 else 'Run'}: {'; '.join(when)}",
        ]
        return f"<small>{'. '.join(parts)}.</small>"


def machine(facts: dict[str, Any]) -> str:
    """'NVIDIA H100 80GB HBM3, 16 cores of Intel Xeon, 126 GiB, files on tmpfs'."""
    cpu = facts["cpu"].replace("(R)", "").replace(" Processor", "")
    where = f"files on {facts['storage'].split()[1]}"
    parts = [facts["gpu"]] if "gpu" in facts else []
    memory = [f"{facts['memory_gib']:.0f} GiB"] if facts.get("memory_gib") else []
    return ", ".join([*parts, f"{facts['cores']} cores of {cpu}", *memory, where])


def versions(facts: Iterable[dict[str, str]]) -> str:
    """'Python 3.12.3, torch 2.11.0, ...', of one run or several."""
    found: dict[str, list[str]] = {}
    for fact in facts:
        for name, version in fact.items():
            if version not in found.setdefault(name.replace("python", "Python"), []):
                found[name.replace("python", "Python")].append(version)
    return ", ".join(f"{name} {' and '.join(every)}" for name, every in found.items())


def table(head: Row, rows: Iterable[Row], numbers_from: int = 1) -> str:
    """A Markdown table; columns from ``numbers_from`` on hold numbers, and are aligned to the right."""
    rule = ["---" if column < numbers_from else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, rule, *rows))


def pictures(result: Result, text: str) -> str:
    """Those that benchmarks/plot.py has drawn of a file of results."""
    drawn = sorted(IMAGES.glob(f"{result.stem}*.png"))
    return "\n\n".join(f"![{text}](../images/{path.name})" for path in drawn)


def page(title: str, *parts: str) -> str:
    """A page of Markdown that says that it is generated."""
    made = "<!-- Made by `make pages` from benchmarks/results; changes here are lost. -->"
    return "\n\n".join((made, f"# {title}", *(part.strip() for part in parts if part.strip()))) + "\n"


# -- numbers ----------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """'0.94', '3.73', '98.8': as many digits as matter."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def each(values: dict[str, Any] | float, form: Any = seconds) -> str:
    """The median, and behind it, where a figure was measured more than once, the least and the largest value."""
    if not isinstance(values, dict):
        return str(form(values))
    low, high = form(min(values["all"])), form(max(values["all"]))
    return str(form(values["median"])) + (f" ({low} to {high})" if low != high else "")


def mib(count: float) -> str:
    return f"{count / MIB:,.0f}"


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def rate(value: float) -> str:
    return f"{value:,.0f}"
