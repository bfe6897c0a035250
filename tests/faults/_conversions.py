"""Conversions to disturb: sources, processes that can be killed, and what a result is compared by."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers import random_weights

MIB = 1 << 20
CONFIG = {"model_type": "llama", "hidden_size": 1024}
SHARDS = 6
#: one thread and small chunks, so that there are many moments to be killed at
SLOWLY: dict[str, Any] = {"threads": 1, "staging_bytes": MIB}


def tensors_of_size(shards: int, side: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Two square weights and a norm for each shard."""
    tensors = {}
    for number in range(shards):
        prefix = f"model.layers.{number}"
        tensors[f"{prefix}.mlp.up_proj.weight"] = random_weights((side, side), dtype, 2 * number)
        tensors[f"{prefix}.mlp.down_proj.weight"] = random_weights((side, side), dtype, 2 * number + 1)
        tensors[f"{prefix}.input_layernorm.weight"] = random_weights((side,), dtype, 99)
    return tensors


def same_files(a: Path, b: Path) -> bool:
    names = sorted(file.name for file in a.iterdir())
    return names == sorted(file.name for file in b.iterdir()) and filecmp.cmpfiles(a, b, names, False)[0] == names


def states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Finished shards of a partial folder (or of a complete one) -> what changes when they are written again."""
    found = {}
    for file in folder.glob("*.safetensors"):
        stat = file.stat()
        found[file.name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


# -- processes that can be killed -------------------------------------------------------------------------------------

# Importing torch takes longer than a conversion: one process imports, and forks for every conversion. It has only one
# thread then, so that forking it is safe. Nothing is proved there, which would import more before a byte is read. A
# trap kills the child at the n-th call of a function whose arguments, as text, hold a pattern.
_FORKER = """
import json, os, pkgutil, re, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
import octavo, octavo.conversion.convert
octavo.convert, octavo.OctavoError  # which import

def set_trap(trap):
    place, name, pattern, count = trap
    owner = pkgutil.resolve_name(place)
    original, calls = getattr(owner, name), 0
    def trapped(*args, **options):
        nonlocal calls
        calls += bool(re.search(pattern, " ".join(map(str, args))))
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    setattr(owner, name, trapped)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 9
        try:
            if order["trap"]:
                set_trap(order["trap"])
            octavo.convert(*order["args"], prove=False, **order["options"])
            code = 0
        except octavo.OctavoError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            code = 2
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


Trap = tuple[str, str, str, int]
#: in a manifest: that a shard is finished
RECORDED = r'"model-0000{}-of-0000\d.safetensors": \d'


class Conversions:
    """Runs conversions in processes of their own."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _FORKER, json.dumps([p for p in sys.path if p])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *args: Path | str, trap: Trap | None = None, **options: Any) -> int:
        """Begin ``octavo.convert(*args, **options)``; returns the process id. `wait` must follow."""
        order = {"args": [str(arg) for arg in args], "options": options, "trap": trap}
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        pipe.write(json.dumps(order) + "\n")
        pipe.flush()
        return int(self._read())

    def wait(self) -> int:
        """The exit code; minus the signal if it was killed."""
        return int(self._read())

    def _read(self) -> str:
        pipe: IO[str] = self._process.stdout  # type: ignore[assignment]
        return pipe.readline()

    def close(self) -> None:
        with self._process:
            self._process.stdin.close()  # type: ignore[union-attr]


_CLI = "import sys; from octavo.cli import main; main()"


def cli(*args: Path | str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", _CLI, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# -- conversions that did not end -------------------------------------------------------------------------------------


class Stopped(Exception):
    """What a test raises in the middle of a conversion."""


def stop_after(shards: int, source: Path, dst: Path, **options: Any) -> None:
    """Let a conversion of three like shards fail with `Stopped` when so many are finished, and the next is written."""

    def progress(done: int, of: int) -> None:
        if done * 3 >= (shards + 1) * of:
            raise Stopped

    with pytest.raises(Stopped):
        octavo.convert(source, dst, progress=progress, **options)
    assert not dst.exists()
    manifest = dst.parent / f"{dst.name}.partial" / "manifest.json"
    assert len(json.loads(manifest.read_text())["finished"] if shards else {}) == shards


def resumed_is_complete(large: Path, dst: Path, finished: Path) -> None:
    """Go on with a killed conversion: shards that were finished stay, the result is the undisturbed one."""
    before = states(dst.parent / f"{dst.name}.partial" / "checkpoint")
    manifest = dst.parent / f"{dst.name}.partial" / "manifest.json"
    recorded = json.loads(manifest.read_text())["finished"] if manifest.exists() else {}
    assert set(recorded) <= set(before)
    report = octavo.convert(large, dst)
    after = states(dst)
    assert {name: before[name] for name in recorded} == {name: after[name] for name in recorded}
    assert same_files(dst, finished)
    assert not manifest.parent.exists()
    # what was finished is not even read again
    share = 1 - len(recorded) / SHARDS
    assert report.read_bytes == pytest.approx(share * report.source_bytes, rel=0.01)
    shutil.rmtree(dst)  # dozens of these would stay on the disk
