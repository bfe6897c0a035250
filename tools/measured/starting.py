"""The page of a process from its start to its first token."""

from __future__ import annotations

from typing import Any

from .loading import model_name
from .results import Result, Sources, gib, load, page, seconds, table

_STEPS = ("torch", "loaded", "first token", "second token")


def make() -> str:
    """The page."""
    parts = [
        """```sh
make bench B=first_token
```

Seconds since the process was started, files in the page cache: when torch is imported, when the model is loaded, when
the first token of a prompt of 32 is there, and a second one for the same prompt, which has nothing to compile and
nothing to choose. Each way is two processes; before the first of them the folders of compiled kernels and of plans are
empty. The very first process on a machine also reads Python's packages from its disk. *Peak* is what torch had
allocated at most.

What remains of a load beside its stream is Python's: importing torch, transformers and the model's class, one after
the other on one core, with octavo's own modules a twentieth of it. The context of the device, pinned memory, kernels
and the reading of files that are not cached go on meanwhile, in threads. [The guide](../guides/load.md#the-first-token)
says what users can do about it: bytecode that is compiled once, caches that outlive a container, fewer packages."""
    ]
    for result in load("first_token"):
        for model, ways in result["models"].items():
            parts += [f"## {model_name(model)}", *_model(result, ways)]
    return page("From the start to the first token", *parts)


def _model(result: Result, ways: dict[str, Any]) -> list[str]:
    sources, lines = Sources(result), []
    measured = {way: row for way, row in ways.items() if way != "checkpoint"}
    for way, row in measured.items():
        for process in ("first", "second"):
            if "at_s" in row.get(process, {}):
                found = row[process]
                at = [seconds(found["at_s"][step]) for step in _STEPS]
                peak = gib(found["allocated_peak_bytes"]) if "allocated_peak_bytes" in found else ""
                lines.append((_name(way), process, *at, peak, sources.letter(row)))
    head = ("", "process", *_STEPS, "peak, GiB", "run")
    parts = [table(head, lines, numbers_from=2)]
    stages = {way: row["second"]["stages_s"] for way, row in measured.items() if "stages_s" in row.get("second", {})}
    for way, found in stages.items():
        each = ", ".join(f"{name} {seconds(took)}" for name, took in found.items() if took >= 0.005)
        parts.append(f"Of the load in the second process ({_name(way)}), seconds: {each}.")
    return [*parts, sources.note()]


def _name(way: str) -> str:
    """'octavo `fp8_channel`'."""
    kind, _, scheme = way.partition("-")
    named = {"octavo": f"octavo `{scheme}`", "config": f"`from_pretrained` with `OctavoConfig`, `{scheme}`"}
    return named.get(kind, f"transformers, {way}" if way in ("bf16", "fp8") else way)
