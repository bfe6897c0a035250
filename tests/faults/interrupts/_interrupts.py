"""Hundreds of conversions disturbed at random moments, many at a time.

    python tests/faults/interrupts/_interrupts.py --kills 200 --interrupts 200 -j 16

The last line of the output is JSON: trials, runs and disturbed runs of each mode, and every problem with its seed. The
exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from _trials import INTERRUPTS, KILLS, Trial, make_place, run_trial, skipped  # noqa: E402


def chosen(kills: int, interrupts: int, seed: int) -> Iterator[tuple[str, int]]:
    """Modes in turn, and the seed of each trial."""
    for modes, count in ((KILLS, kills), (INTERRUPTS, interrupts)):
        possible = [mode for mode in modes if skipped(mode) is None]
        for number in range(count):
            yield possible[number % len(possible)], seed + number


def summary(trials: list[Trial]) -> dict[str, object]:
    modes: dict[str, dict[str, int]] = {}
    for trial in trials:
        counts = modes.setdefault(trial.mode, {"trials": 0, "right": 0, "runs": 0, "disturbed": 0})
        counts["trials"] += 1
        counts["right"] += not trial.problems
        counts["runs"] += trial.runs
        counts["disturbed"] += trial.interrupted
    return {
        "kills": sum(trial.mode in KILLS for trial in trials),
        "interrupts": sum(trial.mode in INTERRUPTS for trial in trials),
        "right": sum(not trial.problems for trial in trials),
        "modes": modes,
        "skipped": {mode: why for mode in INTERRUPTS if (why := skipped(mode))},
        "problems": [vars(trial) for trial in trials if trial.problems],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=200)
    parser.add_argument("-j", "--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(asked.jobs) as pool:
        place = make_place(Path(name))
        waiting = [
            pool.submit(run_trial, mode, seed, place, Path(name) / f"trial-{number}")
            for number, (mode, seed) in enumerate(chosen(asked.kills, asked.interrupts, asked.seed))
        ]
        trials = []
        for number, future in enumerate(waiting):
            trials.append(future.result())
            print(f"{number + 1} of {len(waiting)}: {trials[-1].mode}: {trials[-1].problems or 'right'}", flush=True)
    found = summary(trials)
    print(json.dumps(found))
    sys.exit(1 if found["problems"] else 0)


if __name__ == "__main__":
    main()
