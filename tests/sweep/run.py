"""The sweep: every case in a pool of processes, each within its own limits; results as lines of JSON.

    PYTHONPATH=src:tests python -m sweep.run --jobs 16 --out sweep.jsonl

A process that crashes or hangs costs its case and nothing else. Cases that have a line in the file are not run again,
so that a sweep that was stopped goes on. At the end come the number of cases of each status, and all that are wrong;
the exit code is 1 where there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .cases import Case, every_case

#: cases after which a process is replaced, since imported models take memory
_ROUNDS = 40


class Workers:
    """Processes that check cases, one for each thread that asks."""

    def __init__(self, folder: str, limit_s: float) -> None:
        self.folder, self.limit_s, self.local = folder, limit_s, threading.local()
        self.every: list[subprocess.Popen[str]] = []

    def check(self, case: Case) -> dict[str, Any]:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        began, line = time.monotonic(), ""
        with contextlib.suppress(BrokenPipeError):
            print(case.name, file=process.stdin, flush=True)
            if select.select([process.stdout], [], [], self.limit_s)[0]:
                line = process.stdout.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.local.process = None
        why = f"took more than {self.limit_s:.0f} s"
        if time.monotonic() - began < self.limit_s:
            why = f"its process ended with {process.wait()}"
        process.kill()
        return {"case": case.name, "autos": case.autos, "status": "wrong", "stages": {}, "why": why}

    def _process(self) -> subprocess.Popen[str]:
        self.local.rounds = getattr(self.local, "rounds", -1) + 1
        process: subprocess.Popen[str] | None = getattr(self.local, "process", None)
        if process is not None and self.local.rounds % _ROUNDS == 0:
            self._end(process)
            process = None
        if process is None:
            command = [sys.executable, "-m", f"{__package__}.worker", self.folder]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            process = self.local.process = subprocess.Popen(command, **pipes, text=True, env=environment)
            self.every.append(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for process in self.every:
            process.kill()
            process.wait()


def main() -> None:
    os.environ["OCTAVO_CACHE"] = os.devnull  # of thousands of toys no plan is worth keeping
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-j", "--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases to run, of names as llama/LlamaForCausalLM")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th case, beginning with number I")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one case")
    parser.add_argument("--again", nargs="*", default=[], metavar="STATUS", help="run cases of this status again")
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"), help="lines of JSON, added to")
    parser.add_argument("--folder", default="/dev/shm" if os.path.isdir("/dev/shm") else None, help="where to work")
    asked = parser.parse_args()
    kept = [result for result in read(asked.out) if result["status"] not in asked.again]
    asked.out.write_text("".join(json.dumps(result) + "\n" for result in kept))
    done = {result["case"] for result in kept}
    index, count = map(int, asked.shard.split("/"))
    cases = [case for case in every_case() if re.search(asked.only, case.name)][index::count]
    left = [case for case in cases if case.name not in done]
    print(f"{len(left)} cases of {len(cases)}", flush=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder, open(asked.out, "a") as out:
        workers = Workers(folder, asked.limit)
        with workers, ThreadPoolExecutor(asked.jobs) as pool:
            for number, waiting in enumerate(as_completed([pool.submit(workers.check, case) for case in left]), 1):
                print(json.dumps(waiting.result()), file=out, flush=True)
                if number % 50 == 0:
                    print(f"{number} of {len(left)}", flush=True)
    wanted = {case.name for case in cases}
    sys.exit(summary([result for result in read(asked.out) if result["case"] in wanted]))


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The results in a file, of each case the last one."""
    lines = path.read_text().splitlines() if path.is_file() else []
    yield from {result["case"]: result for result in map(json.loads, lines)}.values()


def summary(results: list[dict[str, Any]]) -> int:
    """Print what was found; 1 if something is wrong."""
    wrong = [result for result in results if result["status"] == "wrong"]
    for result in wrong:
        stages = [f"{name}: {stage['why']}" for name, stage in result["stages"].items() if stage["status"] == "wrong"]
        print(f"{result['case']}: {'; '.join(stages) or result.get('why')}")
    print(json.dumps(Counter(result["status"] for result in results)))
    return int(bool(wrong))


if __name__ == "__main__":
    main()
