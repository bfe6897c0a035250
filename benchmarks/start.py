"""How long until octavo answers: an import, the help, the version, a completion, wrong usage?

    python benchmarks/start.py
    python benchmarks/start.py --before OTHER_CHECKOUT/src     # the two take turns

Every measurement is a process of its own, and the ways take turns. `wall_s` is what a user waits for, `cpu_s` what it
takes, which differs less where something else runs beside. ``python -c pass`` is the floor of all, ``import torch``
that of whatever needs tensors. What a process prints, and its exit code, are looked at first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import common
from common import say, summary

MAIN = "import sys; sys.argv[0] = 'octavo'; from octavo.cli import main; main()"
COMPLETION = {"_OCTAVO_COMPLETE": "complete_bash", "COMP_WORDS": "octavo conv", "COMP_CWORD": "1"}

#: way -> arguments of python, environment, exit code, and what it says
WAYS: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "python -c pass": (["-c", "pass"], {}, 0, ""),
    "import torch": (["-c", "import torch"], {}, 0, ""),
    "import octavo": (["-c", "import octavo"], {}, 0, ""),
    "from octavo import load": (["-c", "from octavo import load"], {}, 0, ""),
    "octavo --version": (["-c", MAIN, "--version"], {}, 0, "octavo "),
    "octavo --help": (["-c", MAIN, "--help"], {}, 0, "convert"),
    "octavo plan --help": (["-c", MAIN, "plan", "--help"], {}, 0, "--device-memory"),
    "octavo bake": (["-c", MAIN, "bake"], {}, 2, "No such command"),
    "octavo plan": (["-c", MAIN, "plan"], {}, 2, "Missing argument"),
    "octavo plan x --scheme int4": (["-c", MAIN, "plan", "x", "--scheme", "int4"], {}, 2, "known: fp8_channel"),
    "octavo conv<TAB>": (["-c", MAIN], COMPLETION, 0, "convert"),
}


def run(way: str, source: Path) -> tuple[float, float]:
    """Wall and processor seconds of a process that goes this way."""
    arguments, more, code, said = WAYS[way]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "100", **more}
    began = perf_counter()
    child = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    )
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
    if child.returncode != code or said not in printed:
        raise RuntimeError(f"{way}: exit code {child.returncode}, {code} was expected: {printed[-500:]}")
    return wall_s, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--before", type=Path, help="the src folder of another checkout, to be measured in turn")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    sources = {"now": common.ROOT / "src", **({"before": options.before} if options.before else {})}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in sources}
    for turn in range(options.repeats + 1):
        for way in options.ways:
            for name, source in sources.items():
                took = run(way, source)
                if turn:  # the first compiles, and fills the page cache
                    found[name].setdefault(way, []).append(took)
    results: dict[str, dict[str, Any]] = {
        name: {
            way: {
                "wall_s": summary([round(wall_s, 3) for wall_s, _ in times]),
                "cpu_s": summary([round(cpu_s, 3) for _, cpu_s in times]),
            }
            for way, times in ways.items()
        }
        for name, ways in found.items()
    }
    for name, ways in results.items():
        for way, result in ways.items():
            say(f"{name:7}{way:29}{result['wall_s']['median']:.3f} s, of a processor {result['cpu_s']['median']:.3f}")
    common.save("start", Path(__file__).parent, {"seconds": results}, write=not options.no_save)


if __name__ == "__main__":
    main()
