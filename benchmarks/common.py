"""What every benchmark needs: facts about the machine, fresh processes that are measured, page cache, results.

Imports neither torch nor octavo, on purpose: the kernel carries the peak memory of the process that forks over to the
child, so a small parent is what makes a child's peak its own. Run alone, it prints the facts.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
FOLDER = Path(os.environ.get("OCTAVO_BENCH_FOLDER", "/tmp/octavo-bench"))
_BLOCK_BYTES = 8 << 20
_SAMPLE_S = 0.01


# -- facts ------------------------------------------------------------------------------------------------------------


def machine(folder: Path) -> dict[str, Any]:
    """CPU, memory, kernel, and the storage that ``folder`` lies on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": found[1] if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "kernel": platform.release(),
        "storage": _storage(folder),
        "load_average": os.getloadavg()[0],
    }


def _storage(folder: Path) -> str:
    """Device, file system and mount point of a folder."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    device, mount, kind = max(
        (m for m in mounts if folder.resolve().is_relative_to(m[1])), key=lambda m: len(m[1]), default=("?", "?", "?")
    )
    return f"{device} {kind} at {mount}"


def machine_name(facts: dict[str, Any]) -> str:
    """'Intel(R) Xeon(R) Processor', 2 cores -> 'intel-xeon-2c': ends the names of result files."""
    words = re.sub(r"\(R\)|\(TM\)|@.*|\b(CPU|Processor)\b|[^\w\s-]", " ", facts["cpu"]).lower().split()
    return "-".join([*words, f"{facts['cores']}c"])


def versions(packages: Iterable[str] = ("torch", "transformers", "safetensors", "numpy")) -> dict[str, str]:
    """Versions of the packages that are installed beside this interpreter, and its own."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit of this checkout, with ``+changes`` if the library differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src") else "")


# -- fresh processes --------------------------------------------------------------------------------------------------

_PRELUDE = """
import json, sys, time
def result(**values): print("RESULT " + json.dumps(values), flush=True)
"""


class ChildError(RuntimeError):
    """A measured process failed; holds the end of its output."""


def run_fresh(code: str, *arguments: object, python: str = sys.executable, log: bool = False) -> dict[str, Any]:
    """Run a snippet in a process of its own, which calls ``result(name=value, ...)`` once at its end.

    Returns:
        what the snippet gave, and ``process``: wall_s (imports included), cpu_s, peak_rss_bytes as the kernel counted
        it (`os.wait4`), and, sampled, the peak of the anonymous part, which unlike mapped files can't be dropped.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        command = [python, "-c", _PRELUDE + code, *map(str, arguments)]
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        sampler = _Sampler(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        anonymous = sampler.stop()
        output.seek(0)
        lines = output.read().splitlines()
    found = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if child.returncode or not found:
        raise ChildError(f"exit code {child.returncode}: " + "\n".join(lines[-15:]))
    if log:
        print(*lines, sep="\n", file=sys.stderr)
    process = {
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes_sampled": anonymous,
    }
    return {**json.loads(found[-1]), "process": process}


class _Sampler:
    """Follows the anonymous memory of another process."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak = pid, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            with contextlib.suppress(OSError):
                found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{self._pid}/status").read_text())
                self._peak = max(self._peak, int(found[1]) * 1024 if found else 0)

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


# -- page cache -------------------------------------------------------------------------------------------------------


def warm(folder: Path) -> None:
    """Read every file, so that the page cache holds it."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


# -- results ----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line for whoever waits; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def summary(values: list[float]) -> dict[str, Any]:
    """Median, and every value."""
    return {"median": statistics.median(values), "all": values}


def save(name: str, folder: Path, values: dict[str, Any], write: bool = True) -> None:
    """Write ``results/NAME-<machine>.json`` and print the same as one line, the last of stdout."""
    facts = machine(folder)
    content = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": facts,
        "versions": versions(),
        **values,
    }
    if write:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{machine_name(facts)}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        say(f"wrote {path}")
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    print(json.dumps({"commit": commit(), "machine": machine(FOLDER.parent), "versions": versions()}))
