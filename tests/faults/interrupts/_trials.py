"""Conversions disturbed at random moments, and the same command until it is done: one trial of each kind.

A trial is right if every disturbed run ends by itself, says so in a sentence, leaves no folder that looks converted and
is not, and if the last run gives the bytes of an undisturbed one and leaves nothing else behind.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

#: one MiB and two threads, so that there are many moments to be disturbed at
_OPTIONS = ("--threads", "2", "--staging", "1MiB")
_HANG_S = 90.0
_DISTURBED_AT_MOST = 3


@dataclass
class Trial:
    """What came of one trial."""

    mode: str
    seed: int
    runs: int = 0
    interrupted: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Place:
    """A folder for one trial: what is converted, what should come of it, and where it goes."""

    source: Path
    right: Path
    dst: Path
    run_s: float  # from the first trace on the disk to the end
    import_s: float  # from the start of the process to that trace

    @property
    def partial(self) -> Path:
        return self.dst.with_name(f"{self.dst.name}.partial")

    def trace(self) -> object:
        """What a run changes on the disk as soon as it begins to convert."""
        with contextlib.suppress(OSError):
            found = (self.partial / "manifest.json").stat()
            return found.st_ino, found.st_mtime_ns
        return self.dst.exists()

    def wait_for_more_than(self, trace: object, runs: Callable[[], Any]) -> None:
        """Until the conversion has changed it, or has ended."""
        deadline = time.monotonic() + _HANG_S
        while self.trace() == trace and runs() and time.monotonic() < deadline:
            time.sleep(0.0005)

    def problems(self) -> list[str]:
        """What is wrong once all is done."""
        if not self.dst.exists():
            return ["no result"]
        others = sorted(path.name for path in self.dst.parent.iterdir() if path != self.dst)
        found = [f"left behind: {', '.join(others)}"] if others else []
        return found if same_files(self.dst, self.right) else [*found, "other bytes"]


def same_files(a: Path, b: Path) -> bool:
    names = sorted(file.name for file in a.iterdir())
    return names == sorted(file.name for file in b.iterdir()) and filecmp.cmpfiles(a, b, names, False)[0] == names


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


def make_place(folder: Path) -> Place:
    """A source of six shards, and how long its conversion takes here."""
    import torch

    from helpers import random_weights, write_checkpoint

    tensors = {
        f"model.layers.{number}.mlp.{name}.weight": random_weights((1024, 1024), torch.bfloat16, number)
        for number in range(6)
        for name in ("up_proj", "down_proj")
    }
    source = write_checkpoint(folder / "source", tensors, 6, {"model_type": "llama", "hidden_size": 1024})
    (source / "tokenizer.json").write_text("{}")
    (folder / "right").mkdir()
    place = Place(source, folder / "right/out", folder / "right/out", 1.0, 1.0)
    started = time.monotonic()
    process = _command(place)
    place.wait_for_more_than(False, lambda: process.poll() is None)
    begun = time.monotonic()
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return Place(source, place.dst, place.dst, time.monotonic() - begun, begun - started)


# -- a process for each run -------------------------------------------------------------------------------------------


def _command(place: Place) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "octavo", "convert", str(place.source), str(place.dst), *_OPTIONS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


#: exit codes of a run that is disturbed in such a way
_CODES = {signal.SIGKILL: {-9}, signal.SIGINT: {130}, signal.SIGTERM: {-15, 130, 143}}


def _disturbed_commands(
    trial: Trial, place: Place, draw: random.Random, which: signal.Signals, times: int, *, in_imports: bool
) -> None:
    """One to three runs that get signals, and one that does not."""
    for _ in range(draw.randint(1, _DISTURBED_AT_MOST)):
        before, process = place.trace(), _command(place)
        if in_imports:
            time.sleep(draw.uniform(0.03, 1) * place.import_s)
        else:
            place.wait_for_more_than(before, lambda: process.poll() is None)  # noqa: B023
            time.sleep(draw.uniform(0, 1.05) * place.run_s)
        _signal(process.pid, which, times, draw)
        ended = _end(trial, process)
        trial.runs += 1
        trial.interrupted += process.returncode != 0
        _judge(trial, place, process.returncode, ended, {0, *_CODES[which]})
        if place.dst.exists():
            return
    process = _command(place)
    ended = _end(trial, process)
    trial.runs += 1
    if process.returncode:
        trial.problems.append(f"undisturbed, and ended with {process.returncode}: {ended}")


def _signal(pid: int, which: signal.Signals, times: int, draw: random.Random) -> None:
    for number in range(times):
        if number:
            time.sleep(draw.choice([0, 0.001, 0.01, 0.1]) * draw.random())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, which)


def _end(trial: Trial, process: subprocess.Popen[str]) -> str:
    """What the process said until it ended."""
    try:
        return process.communicate(timeout=_HANG_S)[1]
    except subprocess.TimeoutExpired:
        trial.problems.append("hangs")
        process.kill()
        return process.communicate()[1]


def _judge(trial: Trial, place: Place, code: int, said: str, expected: set[int]) -> None:
    # an interpreter that is interrupted before it runs a program shows a traceback of its own
    before = code in (1, -2, 130) and "octavo" not in said
    if code not in expected and not before:
        trial.problems.append(f"ended with {code}: {said[-600:]}")
    if any(word in said for word in ("Traceback", "Exception ignored", "Fatal Python")) and not before:
        trial.problems.append(f"ended with {code}, and a traceback: {said[-1500:]}")
    if place.dst.exists():
        if not same_files(place.dst, place.right):
            trial.problems.append("a folder that looks converted, and is not")
        elif code == 130 and "complete" not in said:
            trial.problems.append("says interrupted, and is complete")
    elif code == 0:
        trial.problems.append("says done, and is not")


# -- one process for all runs -----------------------------------------------------------------------------------------

#: answers a line for each line: converts, and says how that ended and what is left of it
_SESSION = Path(__file__).with_name("_session.py")


def _session(place: Place, where: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(_SESSION), str(place.source), str(place.dst), where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    _line(process)
    return process


def _line(process: subprocess.Popen[str]) -> str:
    pipe: IO[str] = process.stdout  # type: ignore[assignment]
    return pipe.readline()


def _ask(process: subprocess.Popen[str]) -> None:
    pipe: IO[str] = process.stdin  # type: ignore[assignment]
    pipe.write("again\n")
    pipe.flush()


def _disturbed_session(trial: Trial, place: Place, draw: random.Random, times: int) -> None:
    """Interrupts within one process that goes on, as at a prompt: its next call follows at once."""
    process = _session(place, "main")
    # a hang ends here, with an empty line
    with process, _ended_after(process, _HANG_S):
        for number in range(_DISTURBED_AT_MOST + 1):
            before = place.trace()
            _ask(process)
            if number < _DISTURBED_AT_MOST:
                place.wait_for_more_than(before, lambda: process.poll() is None)
                time.sleep(draw.uniform(0, 1) * place.run_s)
                _signal(process.pid, signal.SIGINT, times, draw)
            answer = _line(process)
            trial.runs += 1
            if not answer:
                trial.problems.append("hangs, or ended")
                break
            outcome, threads, files = json.loads(answer)
            trial.interrupted += outcome == "interrupted"
            if threads or files:
                trial.problems.append(f"{outcome}, and left at work: {threads}, open: {files}")
            if outcome == "interrupted" and place.dst.exists() and not place.partial.exists():
                break
            if outcome == "done":
                break
            if outcome != "interrupted":
                trial.problems.append(f"the call after an interrupt: {outcome}")
                break
        said = process.communicate()[1]
    if "Traceback" in said or "Exception ignored" in said:
        trial.problems.append(f"a traceback: {said[-1500:]}")


def _disturbed_thread(trial: Trial, place: Place, draw: random.Random) -> None:
    """The main thread is interrupted and leaves, while a thread converts."""
    process = _session(place, "thread")
    with process, _ended_after(process, _HANG_S):
        before = place.trace()
        _ask(process)
        place.wait_for_more_than(before, lambda: process.poll() is None)
        time.sleep(draw.uniform(0, 1) * place.run_s)
        _signal(process.pid, signal.SIGINT, 1, draw)
        answer = _line(process)
        process.communicate()
    trial.runs += 1
    trial.interrupted += not answer
    if not place.dst.exists():
        last = _command(place)
        said = _end(trial, last)
        trial.runs += 1
        if last.returncode:
            trial.problems.append(f"undisturbed, and ended with {last.returncode}: {said}")


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Any:
    """End the process if that takes longer."""
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# -- a notebook -------------------------------------------------------------------------------------------------------

_CELL = "octavo.convert({!r}, {!r}, threads=2, staging_bytes=1 << 20, progress=False)"


def _disturbed_notebook(trial: Trial, place: Place, draw: random.Random) -> None:
    """Interrupts of a kernel, and the same cell again."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(env=environment(), kernel_name="python3")
    try:
        client.execute_interactive("import octavo, octavo.api", timeout=_HANG_S, output_hook=lambda _: None)
        for number in range(_DISTURBED_AT_MOST + 1):
            before = place.trace()
            asked = client.execute(_CELL.format(str(place.source), str(place.dst)))
            if number < _DISTURBED_AT_MOST:
                place.wait_for_more_than(before, manager.is_alive)
                time.sleep(draw.uniform(0, 1) * place.run_s)
                for _ in range(draw.choice([1, 2, 5])):
                    manager.interrupt_kernel()
                    time.sleep(draw.choice([0, 0.01, 0.1]))
            reply: dict[str, Any] = {}
            while reply.get("parent_header", {}).get("msg_id") != asked:
                reply = client.get_shell_msg(timeout=_HANG_S)
            content = reply["content"]
            trial.runs += 1
            if content["status"] == "ok":
                return
            trial.interrupted += 1
            if content.get("ename") not in ("KeyboardInterrupt", None):
                trial.problems.append(f"{content['ename']}: {content['evalue']}")
                return
            if place.dst.exists() and not place.partial.exists():
                return
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# -- all modes --------------------------------------------------------------------------------------------------------


def _by_signal(which: signal.Signals, times: int, *, in_imports: bool = False) -> Callable[..., None]:
    def disturb(trial: Trial, place: Place, draw: random.Random) -> None:
        _disturbed_commands(trial, place, draw, which, times, in_imports=in_imports)

    return disturb


def _in_session(times: int) -> Callable[..., None]:
    return lambda trial, place, draw: _disturbed_session(trial, place, draw, times)


KILLS: dict[str, Callable[..., None]] = {
    "killed": _by_signal(signal.SIGKILL, 1),
    "killed while it imports": _by_signal(signal.SIGKILL, 1, in_imports=True),
}
INTERRUPTS: dict[str, Callable[..., None]] = {
    "Ctrl-C once": _by_signal(signal.SIGINT, 1),
    "Ctrl-C twice": _by_signal(signal.SIGINT, 2),
    "Ctrl-C five times": _by_signal(signal.SIGINT, 5),
    "SIGTERM": _by_signal(signal.SIGTERM, 1),
    "Ctrl-C while it imports": _by_signal(signal.SIGINT, 1, in_imports=True),
    "Ctrl-C at a prompt": _in_session(1),
    "Ctrl-C at a prompt, twice": _in_session(2),
    "Ctrl-C at a prompt, five times": _in_session(5),
    "Ctrl-C beside a thread that converts": _disturbed_thread,
    "a notebook's kernel": _disturbed_notebook,
}


def skipped(mode: str) -> str | None:
    """Why this mode can't be tried here; None where it can."""
    if mode == "a notebook's kernel":
        from importlib.util import find_spec

        if not all(find_spec(name) for name in ("jupyter_client", "ipykernel")):
            return "needs a notebook's kernel: pip install ipykernel"
    return None


def run_trial(mode: str, seed: int, place: Place, folder: Path) -> Trial:
    """One trial, in a folder of its own, which is removed."""
    trial, draw = Trial(mode, seed), random.Random(f"{mode} {seed}")
    folder.mkdir(parents=True)
    mine = Place(place.source, place.right, folder / "out", place.run_s, place.import_s)
    try:
        {**KILLS, **INTERRUPTS}[mode](trial, mine, draw)
        trial.problems += mine.problems()
    except Exception as error:  # of the harness, or what octavo did not promise
        trial.problems.append(f"{type(error).__name__}: {error}")
    shutil.rmtree(folder, ignore_errors=True)
    return trial
