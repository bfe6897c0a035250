"""Fuzzing guided by coverage: atheris (https://github.com/google/atheris) with our mutator, a process or more a target.

    PYTHONPATH=src:tests python -m fuzz.guided --seconds 3600 --jobs 7

What reaches new code is kept in ``.cache/fuzz/corpus``, and the next run begins with it. A process ends at its first
finding, whose input it names.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from .workplace import workplace

# octavo is imported only where atheris watches it, and so is what imports it
_CORPUS = Path(__file__).parent / "corpus"
_TARGETS = sorted(folder.name for folder in _CORPUS.iterdir())
_CACHE = Path(".cache/fuzz")
#: of libFuzzer: seconds for one input, MiB for a process, bytes of an input
_TIMEOUT, _RSS_LIMIT_MB, _MAX_LEN = 10, 4096, 1 << 14


def main() -> int:
    """Run all targets, ``--jobs`` at a time."""
    parser = argparse.ArgumentParser(description="Fuzz octavo, guided by coverage.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=1, help="processes; those beyond one a target share their finds")
    parser.add_argument("--targets", nargs="+", choices=_TARGETS, default=_TARGETS)
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        fuzz(given.one[0], Path(given.one[1]), given.one[2:])
        return 0
    each = max(1, given.jobs // len(given.targets))
    waiting = deque((name, number) for number in range(each) for name in given.targets)
    running: dict[subprocess.Popen[bytes], str] = {}
    failed = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(workplace())
        stack.callback(_end, running)
        while waiting or running:
            while waiting and len(running) < given.jobs:
                name, number = waiting.popleft()
                running[_begin(name, number, given.seconds, folder)] = f"{name}-{number}"
            for process in [process for process in running if process.poll() is not None]:
                label = running.pop(process)
                print(f"{label}: {_last_words(label)}", flush=True)
                if process.returncode:
                    failed.append(label)
            time.sleep(0.2)
    for label in failed:
        print(f"FINDING by {label}: the end of {_log_of(label)}, and the input it names")
    return 1 if failed else 0


def _end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
        process.wait()


def _begin(name: str, number: int, seconds: int, folder: Path) -> subprocess.Popen[bytes]:
    found = _CACHE / "corpus" / name
    found.mkdir(parents=True, exist_ok=True)
    options = [
        *(f"-max_total_time={seconds}", f"-timeout={_TIMEOUT}", f"-rss_limit_mb={_RSS_LIMIT_MB}"),
        *(f"-max_len={_MAX_LEN}", f"-artifact_prefix={_CACHE}/{name}-", "-print_final_stats=1", "-reload=30"),
    ]
    command = [
        sys.executable,
        "-m",
        "fuzz.guided",
        "--one",
        name,
        str(folder / str(number)),
        *options,
        str(found),
        str(_CORPUS / name),
    ]
    with open(_log_of(f"{name}-{number}"), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _log_of(label: str) -> Path:
    return _CACHE / f"{label}.log"


def _last_words(label: str) -> str:
    """What libFuzzer says of all it did."""
    lines = _log_of(label).read_text(errors="replace").splitlines()
    coverage = next((line for line in reversed(lines) if " cov: " in line), "")
    figures = [line.removeprefix("stat::") for line in lines if line.startswith("stat::")]
    return "  ".join([coverage.partition("exec/s")[0].strip(), *(" ".join(figure.split()) for figure in figures)])


def fuzz(name: str, folder: Path, options: Sequence[str]) -> None:
    """Fuzz one target until libFuzzer ends the process."""
    import atheris

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with atheris.instrument_imports(include=["octavo"], enable_loader_override=False):
        from .oracle import FindingError, judge
        from .targets import make

        target = make(name, folder)
        for seed in target.seeds:  # so that all is imported that is imported late
            with contextlib.suppress(FindingError):
                judge(target, seed)

    def one_input(data: bytes) -> None:
        judge(target, data)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        return _mutated(target, data, Random(seed), atheris)[:max_size]

    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=mutator)
    atheris.Fuzz()


def _mutated(target: Any, data: bytes, random: Random, atheris: Any) -> bytes:
    """Mostly a change that knows the grammar; at times libFuzzer's own, which knows what was compared."""
    if data and random.random() < 0.1:
        return bytes(atheris.Mutate(data, len(data) + 8))
    return bytes(target.mutated(data or random.choice(target.seeds), random))


if __name__ == "__main__":
    sys.exit(main())
