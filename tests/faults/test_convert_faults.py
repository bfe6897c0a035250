"""Conversions killed, interrupted, starved of room or misled: no half-success, and the same command goes on."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from _inputs import fails
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from helpers import random_weights, write_checkpoint
from octavo.errors import CheckpointError, OutputError, RecipeError, SourceChangedError, WeightError

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


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    """Tests run beside each other: torch's own threads would wait for one another fifty times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 8 MiB; not to be changed."""
    root = tmp_path_factory.mktemp("large")
    source = write_checkpoint(root / "source", tensors_of_size(SHARDS, 1456), SHARDS, CONFIG)
    (source / "tokenizer.json").write_text("{}")
    return source


@pytest.fixture(scope="session")
def finished(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed conversion of `large` gives."""
    dst = tmp_path_factory.mktemp("finished") / "out"
    octavo.convert(large, dst)
    return dst


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three shards of some 40 KiB, to be broken."""
    return write_checkpoint(tmp_path / "small", tensors_of_size(3, 96), 3, CONFIG)


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
# thread then, so that forking it is safe. A trap kills the child at the n-th call of a function whose arguments, as
# text, hold a pattern.
_FORKER = """
import importlib, json, os, re, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
import octavo

def set_trap(trap):
    module, name, pattern, count = trap
    owner = importlib.import_module(module)
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
            octavo.convert(*order["args"], **order["options"])
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
_RECORDED = r'"model-0000{}-of-0000\d.safetensors": \d'


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


@pytest.fixture(scope="session")
def conversions() -> Iterator[Conversions]:
    made = Conversions()
    yield made
    made.close()


@pytest.fixture(scope="session")
def writes(large: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an undisturbed conversion of `large` with `SLOWLY` writes to its shards."""
    calls, original = 0, os.pwrite

    def counting(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", counting)
        octavo.convert(large, tmp_path_factory.mktemp("counted") / "out", **SLOWLY)
    assert calls > 10 * SHARDS
    return calls


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


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(20))
def test_conversion_killed_at_a_random_moment_goes_on(
    moment: int, conversions: Conversions, writes: int, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    # one in each twentieth of the run; by then, an earlier shard may or may not be synced, renamed and recorded
    count = 1 + int((moment + random.Random(moment).random()) / 20 * writes)
    conversions.start(large, dst, trap=("os", "pwrite", "", count), **SLOWLY)
    assert conversions.wait() == -signal.SIGKILL
    assert not dst.exists()
    resumed_is_complete(large, dst, finished)


def test_conversion_killed_again_and_again_gets_done(
    conversions: Conversions, writes: int, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst, rng = tmp_path / "out", random.Random(0)
    kept: dict[str, tuple[int, int, int]] = {}
    for _ in range(20):
        trap = ("os", "pwrite", "", int(rng.uniform(0.1, 0.4) * writes))
        conversions.start(large, dst, trap=trap, **SLOWLY)
        code = conversions.wait()
        assert dst.exists() == (code == 0)
        now = states(dst if code == 0 else tmp_path / "out.partial" / "checkpoint")
        assert {name: now[name] for name in kept} == kept  # never written a second time
        if code == 0:
            break
        assert code == -signal.SIGKILL
        recorded = json.loads((tmp_path / "out.partial" / "manifest.json").read_text())["finished"]
        assert set(kept) <= set(recorded)
        kept = {name: now[name] for name in recorded}
    assert kept
    assert same_files(dst, finished)


@pytest.mark.parametrize("delay_ms", [0, 3, 10, 30, 60, 100, 150])
def test_conversion_killed_from_outside_goes_on(
    delay_ms: int, conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    """As the above, at moments that are no system call's: in the midst of reading, computing, waiting for the disk."""
    dst = tmp_path / "out"
    child = conversions.start(large, dst, **SLOWLY)
    time.sleep(delay_ms / 1000)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if conversions.wait() == 0 or dst.exists():  # it was quick: then it must be complete
        assert same_files(dst, finished)
    else:
        resumed_is_complete(large, dst, finished)


@pytest.mark.parametrize(
    "trap",
    [
        # the manifest is synced first, then each shard and the manifest again
        pytest.param(("os", "fsync", "", 2), id="the first shard is written, not synced"),
        pytest.param(("os", "replace", "00001-of", 1), id="the first shard is synced, not renamed"),
        pytest.param(("octavo.convert", "_write_text", _RECORDED.format(1), 1), id="it is renamed, not recorded"),
        pytest.param(("os", "replace", "manifest", 2), id="its record is written, not renamed"),
        pytest.param(("os", "fsync", "", 12), id="the last shard is written, not synced"),
        pytest.param(("os", "replace", "00006-of", 1), id="the last shard is synced, not renamed"),
        pytest.param(("octavo.convert", "_write_text", _RECORDED.format(6), 1), id="the last is renamed, not recorded"),
        pytest.param(("shutil", "copyfile", "tokenizer", 1), id="all shards are recorded, nothing else is written"),
        pytest.param(("octavo.convert", "_write_text", "index.json", 1), id="the config is written, the index is not"),
        pytest.param(("os", "rename", "out", 1), id="all is written, not renamed"),
    ],
)
def test_conversion_killed_between_two_steps_goes_on(
    trap: Trap, conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    conversions.start(large, tmp_path / "out", trap=trap)
    assert conversions.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    resumed_is_complete(large, tmp_path / "out", finished)


def test_conversion_killed_after_the_last_rename_is_complete(
    conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    conversions.start(large, dst, trap=("shutil", "rmtree", "out", 1))
    assert conversions.wait() == -signal.SIGKILL
    assert same_files(dst, finished)
    fails(OutputError, "exists already", lambda: octavo.convert(large, dst))
    # its left-overs are in nobody's way, even when the result is no longer there
    dst.rename(tmp_path / "elsewhere")
    octavo.convert(large, dst)
    assert same_files(dst, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_folder_is_never_visible_before_it_is_complete(
    conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst, seen = tmp_path / "out", 0
    conversions.start(large, dst)
    while not dst.exists():
        seen += 1
        time.sleep(0.0005)
    assert same_files(dst, finished)
    assert seen
    assert conversions.wait() == 0


def test_left_overs_of_another_source_are_not_published(
    conversions: Conversions, large: Path, small: Path, tmp_path: Path
) -> None:
    """Killed before anything is recorded, a run leaves files that nothing tells from those of the next run."""
    dst = tmp_path / "out"
    conversions.start(large, dst, trap=("octavo.convert", "_write_text", _RECORDED.format(1), 1))
    assert conversions.wait() == -signal.SIGKILL
    # another source altogether: refusing it would be right, too
    with contextlib.suppress(OutputError, SourceChangedError):
        octavo.convert(small, dst)
        octavo.convert(small, tmp_path / "clean")
        assert same_files(dst, tmp_path / "clean")


# -- interrupted ------------------------------------------------------------------------------------------------------

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


def test_interrupted_command_exits_130_and_goes_on(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(8, 2048, torch.float32), 8, CONFIG)
    octavo.convert(source, tmp_path / "undisturbed")
    dst, partial = tmp_path / "out", tmp_path / "out.partial"
    for _ in range(5):
        process = cli("convert", source, dst, "--threads", "1", "--staging", "1MiB")
        manifest = partial / "manifest.json"
        while process.poll() is None and not (manifest.exists() and json.loads(manifest.read_text())["finished"]):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
        if not dst.exists():
            break
        octavo_was_too_quick = process.returncode == 0
        assert octavo_was_too_quick
        dst.rename(tmp_path / f"complete-{time.time_ns()}")
    else:
        pytest.skip("each conversion was over before it could be interrupted")
    assert (process.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    assert stderr.strip() == "interrupted"
    before = states(partial / "checkpoint")
    recorded = json.loads((partial / "manifest.json").read_text())["finished"]
    assert 0 < len(recorded) < 8
    octavo.convert(source, dst)
    assert {name: states(dst)[name] for name in recorded} == {name: before[name] for name in recorded}
    assert same_files(dst, tmp_path / "undisturbed")


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


def test_exception_in_a_progress_callback_leaves_a_conversion_that_goes_on(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "undisturbed")
    for shards in (0, 1, 2):
        dst = tmp_path / f"out-{shards}"
        stop_after(shards, small, dst)
        octavo.convert(small, dst)
        assert same_files(dst, tmp_path / "undisturbed")


def test_error_while_reading_leaves_a_conversion_that_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.convert(small, tmp_path / "undisturbed")
    original, calls = os.preadv, 0

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(errno.EIO, "Input/output error")
        return original(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        text = fails(CheckpointError, "Input/output error", lambda: octavo.convert(small, tmp_path / "out", threads=1))
    assert "model-00002-of-00003.safetensors" in text
    assert not (tmp_path / "out").exists()
    octavo.convert(small, tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


# -- changed between two runs -----------------------------------------------------------------------------------------


def test_source_that_changed_since_the_interruption_is_noticed(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    stop_after(1, small, dst)
    file = small / "model-00003-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = 1
    save_file(tensors, file)
    text = fails(SourceChangedError, [str(small), "out.partial", "Remove"], lambda: octavo.convert(small, dst))
    assert not dst.exists(), text
    _remove(tmp_path / "out.partial")
    octavo.convert(small, dst)
    assert octavo.verify(dst, small).ok


def test_source_that_changes_while_it_is_read_is_noticed(small: Path, tmp_path: Path) -> None:
    file = small / "model-00002-of-00003.safetensors"
    changed = False

    def progress(done: int, of: int) -> None:
        nonlocal changed
        if not changed:
            changed = True
            os.utime(file, ns=(1, 1))

    fails(
        SourceChangedError,
        "model-00002-of-00003.safetensors: changed",
        lambda: octavo.convert(small, tmp_path / "out", progress=progress),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheme": "fp8_block"}, "recipe"),
        ({"ignore": ["model.layers.0"]}, "recipe"),
        ({"scheme": "fp8_block", "format": "fp8"}, "format"),
        ({"scheme": None}, "layout"),
    ],
)
def test_other_options_than_those_of_the_interrupted_run_are_refused(
    options: dict[str, Any], says: str, small: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    stop_after(1, small, dst)
    fails(OutputError, [str(tmp_path / "out.partial"), says], lambda: octavo.convert(small, dst, **options))
    assert not dst.exists()
    octavo.convert(small, dst)  # with the first options, it still goes on
    assert octavo.verify(dst, small).ok


def test_options_that_leave_the_bytes_alone_may_change(small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out", threads=1, staging_bytes=MIB)
    octavo.convert(small, tmp_path / "out", threads=3, staging_bytes=9 * MIB)
    octavo.convert(small, tmp_path / "undisturbed")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


def test_small_files_that_vanished_since_the_interruption_are_not_published(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "tokenizer.json").write_text("{}")

    def failing(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(Stopped):
            octavo.convert(small, tmp_path / "out")
    (small / "tokenizer.json").unlink()
    octavo.convert(small, tmp_path / "out")
    octavo.convert(small, tmp_path / "undisturbed")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


def test_shard_that_was_lost_since_the_interruption_is_written_again(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    stop_after(2, small, dst)
    manifest = json.loads((tmp_path / "out.partial" / "manifest.json").read_text())
    first, *_ = sorted(manifest["finished"])
    (tmp_path / "out.partial" / "checkpoint" / first).unlink()
    octavo.convert(small, dst)
    assert octavo.verify(dst, small).ok


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"7",
    ],
)
def test_damaged_manifest_is_refused_with_advice(content: bytes, small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    stop_after(1, small, dst)
    (tmp_path / "out.partial" / "manifest.json").write_bytes(content)
    fails(OutputError, ["manifest.json", "damaged", "remove"], lambda: octavo.convert(small, dst))
    assert not dst.exists()


@pytest.mark.parametrize("content", [{}, {"finished": 3}, {"source": {}, "finished": {"x": 1}}])
def test_manifest_of_something_else_is_refused(content: dict[str, Any], small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out")
    (tmp_path / "out.partial" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises((OutputError, SourceChangedError), match=r"out\.partial.* [Rr]emove"):
        octavo.convert(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "finished",
    [
        None,
        [],
        "x",
        {"model-00001-of-00003.safetensors": "long"},
    ],
)
def test_manifest_with_a_damaged_list_is_refused(finished: Any, small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out")
    manifest = tmp_path / "out.partial" / "manifest.json"
    content = {**json.loads(manifest.read_text()), "finished": finished}
    if finished is None:
        del content["finished"]
    manifest.write_text(json.dumps(content))
    try:
        octavo.convert(small, tmp_path / "out")
    except OutputError as error:
        assert "manifest.json" in str(error)  # noqa: PT017
    else:  # ignoring what it does not understand is as good
        assert octavo.verify(tmp_path / "out", small).ok


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "empty folder",
        "file",
        "dangling link",
    ],
)
def test_target_that_exists_is_left_alone(kind: str, small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    if kind == "file":
        dst.write_text("mine")
    elif kind == "dangling link":
        dst.symlink_to(tmp_path / "nowhere")
    else:
        dst.mkdir()
        if kind == "folder":
            (dst / "mine.txt").write_text("mine")
    fails(OutputError, [str(dst), "exists"], lambda: octavo.convert(small, dst))
    assert os.path.lexists(dst)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def test_target_that_appears_meanwhile_is_left_alone(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"

    def progress(done: int, of: int) -> None:
        dst.mkdir(exist_ok=True)
        (dst / "mine.txt").write_text("mine")

    fails(OutputError, str(dst), lambda: octavo.convert(small, dst, progress=progress))
    assert [path.name for path in dst.iterdir()] == ["mine.txt"]


def test_target_without_a_parent_is_refused(small: Path, tmp_path: Path) -> None:
    fails(OutputError, str(tmp_path / "no"), lambda: octavo.convert(small, tmp_path / "no" / "out"))
    assert not (tmp_path / "no").exists()


def test_target_below_a_file_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(OutputError, str(tmp_path / "file"), lambda: octavo.convert(small, tmp_path / "file" / "out"))


def test_target_that_may_not_be_written_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # tests may run as root, who may write everywhere
    fails(OutputError, ["out.partial", "Permission denied"], lambda: octavo.convert(small, tmp_path / "out"))


def test_file_in_place_of_the_partial_folder_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine")
    fails(OutputError, "out.partial", lambda: octavo.convert(small, tmp_path / "out"))
    assert (tmp_path / "out.partial").read_text() == "mine"


def test_second_process_with_the_same_target_is_refused(conversions: Conversions, small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    started, go_on = threading.Event(), threading.Event()

    def progress(done: int, of: int) -> None:
        started.set()
        go_on.wait()

    first = threading.Thread(target=lambda: octavo.convert(small, dst, progress=progress))
    first.start()
    started.wait()
    try:
        conversions.start(small, dst)
        assert conversions.wait() == 2
        fails(OutputError, "another process is converting", lambda: octavo.convert(small, dst))
        conversions.start(small, tmp_path / "other")  # another target is free
        assert conversions.wait() == 0
    finally:
        go_on.set()
        first.join()
    assert same_files(dst, tmp_path / "other")


# -- no room ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Size in KiB -> a folder on a file system of that size; call it again to make it larger. For root only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def resize(kib: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={kib}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted = True
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def _output_kib(source: Path, tmp_path: Path) -> int:
    octavo.convert(source, tmp_path / "measured")
    return sum(file.stat().st_size for file in (tmp_path / "measured").iterdir()) // 1024


def test_full_disk_is_noticed_before_anything_is_written(
    small: Path, tmp_path: Path, tiny_disk: Callable[[int], Path]
) -> None:
    needed = _output_kib(small, tmp_path)
    disk = tiny_disk(needed // 2)
    fails(OutputError, [str(disk), "are still to be written", "are free"], lambda: octavo.convert(small, disk / "out"))
    assert not (disk / "out").exists()
    tiny_disk(4 * needed)
    octavo.convert(small, disk / "out")
    assert same_files(disk / "out", tmp_path / "measured")


def test_disk_that_fills_up_meanwhile_is_a_clear_error_and_the_run_goes_on(
    tmp_path: Path, tiny_disk: Callable[[int], Path]
) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(3, 512), 3, CONFIG)
    needed = _output_kib(source, tmp_path)
    disk = tiny_disk(needed * 3)

    def fill(done: int, of: int) -> None:
        if not (disk / "ballast").exists():
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 4096))

    text = fails(OutputError, "No space left", lambda: octavo.convert(source, disk / "out", progress=fill, threads=1))
    assert "make room and run the same command again" in text
    assert not (disk / "out").exists()
    done = states(disk / "out.partial" / "checkpoint")
    (disk / "ballast").unlink()
    octavo.convert(source, disk / "out")
    assert same_files(disk / "out", tmp_path / "measured")
    assert done.items() <= states(disk / "out").items()


def test_room_of_an_unfinished_shard_counts_as_free(
    conversions: Conversions, tmp_path: Path, tiny_disk: Callable[[int], Path]
) -> None:
    """A run killed in its only shard has claimed that shard's room: going on needs no more than it has already."""
    source = write_checkpoint(tmp_path / "source", tensors_of_size(1, 512), 1, CONFIG)
    disk = tiny_disk(_output_kib(source, tmp_path) * 3 // 2)
    conversions.start(source, disk / "out", trap=("os", "fsync", "", 2))
    assert conversions.wait() == -signal.SIGKILL
    octavo.convert(source, disk / "out")
    assert same_files(disk / "out", tmp_path / "measured")


def test_file_size_limit_is_a_clear_error(small: Path, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    process = cli("convert", small, tmp_path / "out", preexec_fn=limit)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, "")
    assert "model-00001-of-00003.safetensors.part: writing failed: File too large" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fsync", "replace", "rename"])
def test_every_failing_system_call_is_an_output_error_and_the_run_goes_on(
    function: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.convert(small, tmp_path / "undisturbed")
    original = getattr(os, function)
    for allowed in (0, 1, 2):
        calls = 0

        def failing(*args: Any, allowed: int = allowed, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **options)

        dst = tmp_path / f"out-{allowed}"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            if function == "rename" and allowed:
                continue  # there is but one
            text = fails(OutputError, "No space left on device", lambda: octavo.convert(small, dst))  # noqa: B023
        assert str(tmp_path) in text
        assert not dst.exists()
        octavo.convert(small, dst)
        assert same_files(dst, tmp_path / "undisturbed")


# -- weights and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
def test_weight_that_is_not_finite_is_named_with_its_position(
    scheme: str, value: float, small: Path, tmp_path: Path
) -> None:
    file = small / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][70, 31] = value
    save_file(tensors, file)
    text = fails(
        WeightError,
        [file.name, "model.layers.1.mlp.down_proj.weight", "[70, 31]", str(value), "ignore=["],
        lambda: octavo.convert(small, tmp_path / "out", scheme),
    )
    assert not (tmp_path / "out").exists(), text
    fails(WeightError, "[70, 31]", lambda: list(octavo.stream(small, scheme)))


def test_weight_that_is_not_finite_may_be_kept(small: Path, tmp_path: Path) -> None:
    file = small / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][70, 31] = float("nan")
    save_file(tensors, file)
    fails(WeightError, "non-finite", lambda: octavo.convert(small, tmp_path / "first"))
    octavo.convert(small, tmp_path / "out", ignore=["model.layers.1.mlp.down_proj.weight"])
    assert octavo.verify(tmp_path / "out", small).ok


def test_repaired_weight_begins_anew(small: Path, tmp_path: Path) -> None:
    """The advice in the error leads to a conversion, whatever it takes to remove first."""
    file = small / "model-00003-of-00003.safetensors"
    sound = load_file(file)
    broken = {name: tensor.clone() for name, tensor in sound.items()}
    broken["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(broken, file)
    fails(WeightError, "inf", lambda: octavo.convert(small, tmp_path / "out"))
    save_file(sound, file)
    fails(SourceChangedError, "out.partial", lambda: octavo.convert(small, tmp_path / "out"))
    _remove(tmp_path / "out.partial")
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


def test_unknown_format_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    fails(RecipeError, "unknown format", lambda: octavo.convert(small, tmp_path / "out", format="awq"))
    fails(RecipeError, "has no mxfp8", lambda: octavo.convert(small, tmp_path / "out", "mxfp8", format="fp8"))
    fails(RecipeError, "unknown scheme", lambda: octavo.convert(small, tmp_path / "out", "int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


# -- verify finds what is wrong ---------------------------------------------------------------------------------------

CASES = [
    ("compressed-tensors", "fp8_channel"),
    ("compressed-tensors", "fp8_block"),
    ("compressed-tensors", "fp8_tensor"),
    ("compressed-tensors", "mxfp8"),
    ("fp8", "fp8_block"),
]
_WEIGHT = "model.layers.1.mlp.down_proj.weight"


def _flip(folder: Path, name: str, bit: int) -> None:
    """Flip one bit of a tensor's bytes on disk; ``bit`` counts from its end if negative."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8 : 8 + length]).get(name)
        if entry:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            position = (8 * begin if bit >= 0 else 8 * end) + bit
            raw[position // 8] ^= 1 << position % 8
            file.write_bytes(raw)
            return
    raise AssertionError(f"{name} is in none of the files")


@pytest.mark.parametrize(("format", "scheme"), CASES)
@pytest.mark.parametrize(
    "what",
    [
        "weight",
        "scale",
        "kept",
    ],
)
def test_verify_finds_one_flipped_bit(format: str, scheme: str, what: str, small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out", scheme, format=format)
    suffix = "_scale" if format == "compressed-tensors" else "_scale_inv"
    name = {"weight": _WEIGHT, "scale": _WEIGHT + suffix, "kept": "model.layers.1.input_layernorm.weight"}[what]
    bits = range(8) if what == "scale" and scheme == "mxfp8" else (0, 7, -1, -2)
    for bit in bits:
        _flip(tmp_path / "out", name, bit)
        report = octavo.verify(tmp_path / "out", small)
        assert not report.ok
        (different,) = report.different
        assert different.name == (_WEIGHT if what == "scale" else name)
        assert different.differing_bytes == 1
        json.dumps(report.to_dict(), allow_nan=False)
        _flip(tmp_path / "out", name, bit)
    assert octavo.verify(tmp_path / "out", small).ok


def test_verify_finds_flipped_bits_in_the_last_block_of_a_large_tensor(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(octavo.verify.__globals__, "_BLOCK_ELEMENTS", 1 << 14)
    tensors = {"a.up_proj.weight": random_weights((700, 300), torch.bfloat16, 0)}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    for scheme in ("fp8_channel", "fp8_block", "fp8_tensor"):
        octavo.convert(source, tmp_path / scheme, scheme)
        for name in ("a.up_proj.weight", "a.up_proj.weight_scale"):
            _flip(tmp_path / scheme, name, -9)
            assert [result.differing_bytes for result in octavo.verify(tmp_path / scheme, source).tensors] == [1]
            _flip(tmp_path / scheme, name, -9)


def _edit(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(lambda t: t.pop(_WEIGHT), f"{_WEIGHT}: in ", id="no weight"),
        pytest.param(lambda t: t.pop(f"{_WEIGHT}_scale"), f"{_WEIGHT} is F8_E4M3, but has no scale", id="no scale"),
        pytest.param(
            lambda t: t.pop("model.layers.0.input_layernorm.weight"),
            "model.layers.0.input_layernorm.weight",
            id="no norm",
        ),
        pytest.param(lambda t: t.update(alien=torch.ones(1)), "alien: not in", id="one too many"),
        pytest.param(
            lambda t: t.update({f"{_WEIGHT}_scale": torch.ones(7, 1)}),
            "a scale [7, 1] (fp32)",
            id="scale of another shape",
        ),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT][:5].clone()}), "[5, 96] here, [96, 96] there", id="shape"),
        pytest.param(
            lambda t: t.update({"model.layers.0.input_layernorm.weight_scale": torch.ones(1)}),
            "model.layers.0.input_layernorm.weight_scale",
            id="a scale of what is not quantized",
        ),
    ],
)
def test_verify_names_what_is_missing_or_misshapen(
    edit: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(2, 96), 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    _edit(tmp_path / "out", edit)
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", source))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t.update({f"{_WEIGHT}_scale": t[f"{_WEIGHT}_scale"].bfloat16()}), id="scale in bf16"),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT].view(torch.uint8)}), id="weight in uint8"),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT].view(torch.float8_e5m2)}), id="weight in e5m2"),
    ],
)
def test_verify_finds_tensors_of_another_dtype(edit: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(2, 96), 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    _edit(tmp_path / "out", edit)
    assert [result.name for result in octavo.verify(tmp_path / "out", source).different] == [_WEIGHT]


def test_verify_finds_a_config_that_does_not_tell_of_fp8(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    fails(CheckpointError, "no quantization_config", lambda: octavo.verify(tmp_path / "out", small))


def test_verify_does_not_compare_a_folder_with_itself(small: Path) -> None:
    fails(CheckpointError, "compared with itself", lambda: octavo.verify(small, small))


def test_verify_finds_weights_quantized_from_other_values(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", {n: t * 1.5 for n, t in tensors_of_size(3, 96).items()}, 3, CONFIG)
    report = octavo.verify(tmp_path / "out", other)
    assert not report.ok
    assert len(report.different) == 9


def test_verify_command_exits_1_for_a_flipped_bit_and_2_for_a_missing_tensor(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    octavo.convert(small, dst)
    _flip(dst, _WEIGHT, 3)
    flipped = cli("verify", dst, "--against", small)
    stdout, stderr = flipped.communicate()
    assert f"{_WEIGHT}  fp8_channel  1 bytes differ" in stdout
    assert "DIFFERENT: 1 tensors" in stdout
    assert (flipped.returncode, stderr) == (1, "")
    _flip(dst, _WEIGHT, 3)
    file = dst / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors.pop(_WEIGHT)
    save_file(tensors, file)
    (dst / "model.safetensors.index.json").unlink()
    missing = cli("verify", dst, "--against", small)
    stdout, stderr = missing.communicate()
    assert (missing.returncode, stdout) == (2, "")
    assert f"{_WEIGHT}: in {small}, but not here" in stderr
    assert "Traceback" not in stderr


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def test_fixture_is_large_enough_to_be_killed(large: Path) -> None:
    sizes = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(sizes) == SHARDS
    assert min(sizes) > 8 * MIB
