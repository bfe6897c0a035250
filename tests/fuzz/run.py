"""A campaign: any number of inputs from the structure-aware mutator, in several processes, without other packages.

    PYTHONPATH=src:tests python -m fuzz.run --inputs 2000000 --jobs 15 --seconds 500 --json out.json
    PYTHONPATH=src:tests python -m fuzz.run --replay tests/fuzz/corpus/headers/sound.safetensors --targets headers

Input number N of a target is the same for the same ``--seed``, whatever the number of processes. The exit code is 1 if
there are findings, and 3 if time was over before all inputs were judged. Findings are in the folder ``--findings``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import worker
from .oracle import FindingError, judge
from .targets import TARGETS, make
from .worker import Progress, Task
from .workplace import workplace

#: seconds without a new input after which a process is killed: its own guard should have acted long before
_STUCK_SECONDS = 60
#: bytes that a process may grow by after its first inputs
_GROWTH_BYTES = 256 << 20
#: processes that may end before their time in one place
_MOST_LOST = 20
_VERDICTS = ("accepted", "refused", "findings")
_MEMORY = ("peak_bytes", "warm_bytes", "last_bytes")


def main() -> int:
    """Run a campaign, or replay files."""
    os.environ["OCTAVO_CACHE"] = os.devnull  # of thousands of toys no plan is worth keeping
    parser = argparse.ArgumentParser(description="Fuzz octavo with structure-aware mutations.")
    parser.add_argument("--inputs", type=int, default=20_000, help="in all, shared out among the targets")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other inputs")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz/findings"), help="a folder for inputs")
    parser.add_argument("--replay", nargs="+", type=Path, help="judge these files, as inputs of the one target named")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker.main(*given.worker)
        return 0
    if given.replay:
        return replay(given.targets, given.replay)
    found = campaign(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    show(found)
    return 1 if found["findings"] else 3 if found["inputs"] < given.inputs else 0


def campaign(given: argparse.Namespace) -> dict[str, Any]:
    """Run all processes, and put their figures together."""
    began = time.time()
    given.findings.mkdir(parents=True, exist_ok=True)
    for old in given.findings.iterdir():
        old.unlink()
    with workplace() as folder:
        tasks = [
            Task(given.seed, index, given.jobs, _totals(given), began + given.seconds, str(given.findings), str(folder))
            for index in range(given.jobs)
        ]
        processes = [_Worker(task, folder) for task in tasks]
        try:
            # each is looked after, whether or not another goes on
            while sum(each.goes_on() for each in processes):
                time.sleep(0.5)
        finally:
            for each in processes:
                each.process.kill()
                each.process.wait()
        counts = {
            name: {what: sum(each.progress[f"{name}.{what}"] for each in processes) for what in _VERDICTS}
            for name in given.targets
        }
        memory = [{what: each.progress[what] for what in _MEMORY} for each in processes]
    lost = [line for each in processes for line in each.lost]
    in_all = {what: sum(count[what] for count in counts.values()) for what in _VERDICTS}
    return {
        "seed": given.seed,
        "jobs": given.jobs,
        "seconds": round(time.time() - began, 1),
        "inputs": sum(in_all.values()) + len(lost),
        "accepted": in_all["accepted"],
        "refused": in_all["refused"],
        "targets": counts,
        "findings": _grouped(given.findings, [*lost, *_grown(memory)]),
        "peak_bytes": max(each["peak_bytes"] for each in memory),
        "workers": memory,
    }


def _totals(given: argparse.Namespace) -> dict[str, int]:
    """The number of inputs of each target."""
    shares = {name: TARGETS[name].share for name in given.targets}
    totals = {name: given.inputs * share // sum(shares.values()) for name, share in shares.items()}
    totals[given.targets[0]] += given.inputs - sum(totals.values())
    return totals


def _grown(memory: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """A finding for each process that needed more and more memory."""
    growth = [each["last_bytes"] - each["warm_bytes"] if each["warm_bytes"] else 0 for each in memory]
    return [
        {"target": "all", "kind": "growth", "text": f"process {index}: {grown:,} bytes"}
        for index, grown in enumerate(growth)
        if grown > _GROWTH_BYTES
    ]


class _Worker:
    """A process, begun anew after the input that killed it."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.path = task, folder / f"progress-{task.index}"
        self.progress = Progress(self.path)
        self.lost: list[dict[str, Any]] = []
        self._begin()

    def _begin(self) -> None:
        command = [sys.executable, "-m", "fuzz.run", "--worker", json.dumps(asdict(self.task)), str(self.path)]
        with open(Path(self.task.findings) / f"worker-{self.task.index}.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._turns, self._seen = self._state(), time.time()

    def _state(self) -> dict[str, int]:
        return {name: self.progress[f"{name}.next"] for name in self.task.totals}

    def goes_on(self) -> bool:
        """Return False when the work is done; see to it that it is being done."""
        code, turns = self.process.poll(), self._state()
        if code == 0:
            return False
        if turns != self._turns:
            self._turns, self._seen = turns, time.time()
        stuck = code is None and time.time() - self._seen > _STUCK_SECONDS
        if stuck:
            self.process.kill()
            code = self.process.wait()
        if code is not None:
            done = {n: sum(self.progress[f"{n}.{w}"] for w in _VERDICTS) for n in turns}
            open_ = [n for n in turns if done[n] + sum(line["target"] == n for line in self.lost) < turns[n]]
            kind = "hang" if stuck else f"the process ended with {code}"
            name = open_[0] if open_ else "all"
            self.lost.append({"target": name, "number": self.progress["current"], "kind": kind, "text": ""})
            if len(self.lost) >= _MOST_LOST:
                return False
            self._begin()
        return True


def _grouped(folder: Path, more: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Findings by target and kind, the most frequent first."""
    lines = [json.loads(line) for log in sorted(folder.glob("worker-*.jsonl")) for line in log.read_text().splitlines()]
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for line in [*lines, *more]:
        group = groups.setdefault((line["target"], line["kind"]), {**line, "count": 0})
        group["count"] += 1
    return sorted(groups.values(), key=lambda group: -group["count"])


def show(found: dict[str, Any]) -> None:
    """Print the figures of a campaign."""
    print(f"{'target':12} {'accepted':>10} {'refused':>10} {'findings':>10}")
    for name, count in found["targets"].items():
        print(f"{name:12} {count['accepted']:10,} {count['refused']:10,} {count['findings']:10,}")
    for finding in found["findings"]:
        print(f"{finding['count']:6,} x {finding['target']}: {finding['kind']}: {finding['text'][:300]!a}")
        print(f"         {finding.get('file', '')}")
    print(
        f"{found['inputs']:,} inputs in {found['seconds']} s by {found['jobs']} processes, seed {found['seed']}: "
        f"{found['accepted']:,} accepted, {found['refused']:,} refused, {len(found['findings'])} kinds of findings; "
        f"peak of a process {found['peak_bytes'] >> 20} MiB"
    )


def replay(names: Sequence[str], files: Sequence[Path]) -> int:
    """Judge files, and print what comes of each."""
    found = 0
    with workplace() as folder:
        target = make(names[0], folder)
        for file in files:
            try:
                verdict = "accepted" if judge(target, file.read_bytes()) else "refused"
            except FindingError as finding:
                verdict, found = f"FINDING {finding}\n  from {finding.__cause__!r}", 1
            print(f"{file}: {verdict}")
    return found


if __name__ == "__main__":
    sys.exit(main())
