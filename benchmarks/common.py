"""What every benchmark needs: fresh processes that are measured, page cache, results.

Imports neither torch nor octavo, on purpose: the kernel carries the peak memory of the process that forks over to the
child, so a small parent is what makes a child's peak its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from _facts import ROOT, commit, file_system, gpu, machine, machine_name, versions

RESULTS = Path(__file__).resolve().parent / "results"
IN_MEMORY = ("tmpfs", "ramfs")
FOLDER = Path(os.environ.get("OCTAVO_BENCH_FOLDER", "/tmp/octavo-bench"))
_BLOCK_BYTES = 8 << 20
_SAMPLE_S = 0.01
_OUTPUT = re.compile(r" --output \S+")  # where a result was written does not belong to it


# -- the GPU -----------------------------------------------------------------------------------------------------------


def device_used() -> Callable[[], int] | None:
    """Asks the driver how much of the first GPU's memory is in use, by whomever."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception as error:  # NVMLError has no base but Exception
        say(f"no figures of the whole card: {type(error).__name__}: {error}")
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def lacks_gpu(name: str, device: str = "cuda", *, tries_on_cpu: bool = True) -> bool:
    """Whether the GPU that a benchmark asks for is not there; says so, on stdout as its result."""
    if device == "cpu" or gpu():
        return False
    say("no GPU: nothing was measured" + ("; --device cpu --no-save tries the benchmark out" if tries_on_cpu else ""))
    print(json.dumps({"benchmark": name, "skipped": "no GPU"}))
    return True


# -- fresh processes --------------------------------------------------------------------------------------------------

_PRELUDE = """
import json, os, sys, time
STARTED_S = float(os.environ["OCTAVO_BENCH_STARTED_S"])
def result(**values): print("RESULT " + json.dumps(values), flush=True)
"""


class ChildError(RuntimeError):
    """A measured process failed; holds the end of its output.

    Attributes:
        output: all of it.
        found: what it had given by then; empty if nothing.
        samples: see `run_fresh`.
        late_s: after how long it was ended, if it took too long.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.output = ""
        self.found: dict[str, Any] = {}
        self.samples: list[tuple[float, int, int, int]] = []
        self.late_s: float | None = None


def run_fresh(
    code: str,
    *arguments: object,
    python: str = sys.executable,
    log: bool = False,
    timeout_s: float | None = None,
    device_used: Callable[[], int] | None = None,
    samples: bool = False,
) -> dict[str, Any]:
    """Run a snippet in a process of its own, which calls ``result(name=value, ...)`` at its end.

    Before that, it may call it for what it has by then, for the case that it fails afterwards. Processes that it
    started end with it.

    The snippet knows ``STARTED_S``, when it was started, on the clock of `time.perf_counter` (one for all processes).

    Args:
        timeout_s: the process is killed after that, with those that it started.
        device_used: bytes in use on a device, sampled beside the process's own memory.
        samples: whether to return the samples.

    Returns:
        what the snippet gave, and ``process``: wall_s (imports included), cpu_s, peak_rss_bytes as the kernel counted
        it (`os.wait4`), and, sampled, the peak of the anonymous part, which unlike mapped files can't be dropped.
        With ``samples``, also a list of [at_s, anonymous, mapped, device]: bytes, mapped ones being files and shared
        memory (a mapped file on tmpfs counts as shared).

    Raises:
        ChildError: it failed, or took too long.
    """
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        environment["OCTAVO_BENCH_STARTED_S"] = repr(started)
        command = [python, "-c", _PRELUDE + code, *map(str, arguments)]
        # a group of its own: ranks of an engine that was killed would keep the memory of their GPUs
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        sampler = _Sampler(child.pid, device_used)
        killer = threading.Timer(timeout_s, _kill_group, [child.pid]) if timeout_s else None
        if killer:
            killer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        finally:  # also where the user has had enough
            _kill_group(child.pid)
            if killer:
                killer.cancel()
        wall_s = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        trace = sampler.stop()
        output.seek(0)
        lines = output.read().splitlines()
    found = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    if child.returncode or not found:
        is_late = timeout_s is not None and wall_s >= timeout_s
        late = f" (killed after {timeout_s:.0f} s)" if is_late else ""
        error = ChildError(f"exit code {child.returncode}{late}: " + "\n".join(lines[-15:]))
        error.output, error.samples, error.late_s = "\n".join(lines), trace, timeout_s if is_late else None
        error.found = json.loads(found[-1]) if found and found[-1].endswith("}") else {}
        raise error
    if log:
        print(*lines, sep="\n", file=sys.stderr)
    process = {
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes_sampled": max((sample[1] for sample in trace), default=0),
    }
    return {**json.loads(found[-1]), "process": process, **({"samples": trace} if samples else {})}


def _kill_group(pid: int) -> None:
    """End a process and all that it started, as far as they are still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class _Sampler:
    """Follows the memory of another process, and of a device."""

    def __init__(self, pid: int, device_used: Callable[[], int] | None = None) -> None:
        self._pid, self._device_used = pid, device_used or (lambda: 0)
        self._samples: list[tuple[float, int, int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{self._pid}/status").read_text()
                sizes = {key: int(kib) * 1024 for key, kib in re.findall(r"Rss(\w+):\s*(\d+) kB", text)}
                mapped = sizes.get("File", 0) + sizes.get("Shmem", 0)
                self._samples.append((time.perf_counter(), sizes.get("Anon", 0), mapped, self._device_used()))

    def stop(self) -> list[tuple[float, int, int, int]]:
        self._stop.set()
        self._thread.join()
        return self._samples


# -- page cache -------------------------------------------------------------------------------------------------------


def warm(folder: Path) -> None:
    """Read every file, so that the page cache holds it."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(folder: Path) -> None:
    """Make the page cache forget every file; where asking does not help, and the user may, the whole cache."""
    os.sync()  # what is not yet written can't be dropped
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(folder) > 0.01:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("1")


def cached_share(folder: Path) -> float:
    """How much of the bytes of all files the page cache holds, from 0 to 1 (``mincore``)."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    resident = pages = 0
    for path in folder.iterdir():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * count)()
            first = ctypes.c_ubyte.from_buffer(mapped)
            if mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), found):
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            del first  # or the mapping could not be closed
            resident, pages = resident + count - bytes(found).count(0), pages + count
    return resident / max(pages, 1)


def set_cache(folder: Path, cold: bool) -> float:
    """Warm or cool, as far as needed; returns what share is cached then."""
    if file_system(folder) in IN_MEMORY:
        return 1.0
    if cold:
        cool(folder)
    elif cached_share(folder) < 1:
        warm(folder)
    return cached_share(folder)


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


# -- results ----------------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser, default: Iterable[str], known: Iterable[str]) -> None:
    """Which checkpoints are made, and where."""
    parser.add_argument("--models", "--model", nargs="+", default=list(default), choices=list(known), metavar="MODEL")
    parser.add_argument("--layers", type=int, help="instead of the models' own number, to try things out")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/octavo-bench"), help="(%(default)s)")


def add_result_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Where what is measured goes."""
    into = f"results/{name}-<machine>.json"
    parser.add_argument("--output", type=Path, help=f"merge into this file instead of {into}")
    parser.add_argument("--no-save", action="store_true", help="print only")


def model_folder(folder: Path, model: str, layers: int | None) -> Path:
    """Where the benchmarks keep a model's checkpoint, so that they share it."""
    return folder / (f"{model}-{layers}" if layers else model)


def say(text: str) -> None:
    """A line for whoever waits; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def summary(values: list[float]) -> dict[str, Any]:
    """Median, and every value."""
    return {"median": statistics.median(values), "all": values}


def save(name: str, folder: Path, values: dict[str, Any], write: bool = True) -> None:
    """Write ``results/NAME-<machine>.json`` and print the same as one line, the last of stdout."""
    content = {"benchmark": name, **circumstances(folder), **values}
    if write:
        _write(results_path(name, content["machine"]), content)
    print(json.dumps(content), flush=True)


def circumstances(folder: Path) -> dict[str, Any]:
    """What a result holds beside its values: date, commit, machine, versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(folder),
        "versions": versions(),
    }


def results_path(name: str, facts: dict[str, Any]) -> Path:
    return RESULTS / f"{name}-{machine_name(facts)}.json"


class Merged:
    """A result file that grows by parts, each measured in a run of its own, and is written after each part.

    ``runs`` says under which circumstances (date, commit, machine, versions, command) the parts that name a run were
    measured; runs that no part names any more are dropped.
    """

    def __init__(self, name: str, folder: Path, output: Path | None, write: bool = True, **facts: Any) -> None:
        """
        Args:
            output: where to write; it starts from what is there, or else from the committed result of this machine.
        """
        run = {**circumstances(folder), "command": _OUTPUT.sub("", " ".join(sys.argv)), **facts}
        committed = results_path(name, run["machine"])
        self.path, self._write = output or committed, write
        start = next((path for path in (self.path, committed) if path.is_file()), None) if write else None
        self.content: dict[str, Any] = json.loads(start.read_text()) if start else {"benchmark": name, "runs": {}}
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S")
        self.content["runs"][self.run] = run
        self._parts: list[tuple[str, ...]] = []

    def add(self, part: dict[str, Any], *keys: str) -> None:
        """Put a part in its place, instead of what was there."""
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = {"run": self.run, **part}
        self._parts.append(keys)
        self._save()

    def _save(self) -> None:
        if self._write:
            _write(self.path, self._pruned(), quiet=True)

    def close(self, **facts: Any) -> None:
        """Add facts about the run, and print what it measured as one line, the last of stdout."""
        self.content["runs"][self.run] |= facts
        self._save()
        parts: dict[str, Any] = {}
        for keys in self._parts:
            place, found = parts, self.content
            for key in keys[:-1]:
                place, found = place.setdefault(key, {}), found[key]
            place[keys[-1]] = found[keys[-1]]
        if self._write:
            say(f"wrote {self.path}")
        content = {"benchmark": self.content["benchmark"], "runs": {self.run: self.content["runs"][self.run]}}
        print(json.dumps({**content, **parts}), flush=True)

    def _pruned(self) -> dict[str, Any]:
        named: set[str] = set()

        def look(value: Any) -> None:
            if isinstance(value, dict):
                if isinstance(value.get("run"), str):
                    named.add(value["run"])
                for inner in value.values():
                    look(inner)

        look({key: value for key, value in self.content.items() if key != "runs"})
        return {**self.content, "runs": {key: value for key, value in self.content["runs"].items() if key in named}}


@contextlib.contextmanager
def merged(name: str, args: argparse.Namespace, **facts: Any) -> Iterator[Merged]:
    """The result of a benchmark with the arguments of `add_result_arguments`; closed where nothing was raised."""
    args.folder.mkdir(parents=True, exist_ok=True)
    result = Merged(name, args.folder, args.output, write=not args.no_save, **facts)
    yield result
    result.close()


def _write(path: Path, content: dict[str, Any], quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
    if not quiet:
        say(f"wrote {path}")
