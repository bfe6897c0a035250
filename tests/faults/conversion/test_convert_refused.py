"""Conversions that can't be: targets, disks, weights and formats; each a clear error, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _conversions import CONFIG, Conversions, cli, same_files, states, tensors_of_size
from _inputs import fails
from safetensors.torch import load_file, save_file

import octavo
from helpers import write_checkpoint
from octavo.conversion.partial import PartialFolder
from octavo.errors import OutputError, RecipeError, SourceChangedError, WeightError

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


def test_target_that_another_run_completes_first_is_noticed_before_anything_is_read(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ended between the first look at the target and the lock."""
    original, calls = PartialFolder.locked, []

    def locked(path: Path, mode: int) -> Any:
        if not calls:
            calls.append(path)
            octavo.convert(small, tmp_path / "out")
        return original(path, mode)

    monkeypatch.setattr(PartialFolder, "locked", locked)
    progress: list[int] = []
    fails(
        OutputError,
        "exists already",
        lambda: octavo.convert(small, tmp_path / "out", progress=lambda done, of: progress.append(done)),
    )
    assert not any(progress)
    assert octavo.verify(tmp_path / "out", small).ok


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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_that_cannot_lock_is_not_called_another_process(
    number: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    text = fails(
        OutputError,
        ["out.partial: can't be locked", os.strerror(number)],
        lambda: octavo.convert(small, tmp_path / "out"),
    )
    assert "another process is converting" not in text


def test_shards_with_the_longest_names_are_converted(small: Path, tmp_path: Path) -> None:
    """Also while they are not finished, when names are longer by some characters."""
    index = small / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    longest = {name: name.replace("model", "m" * 222) for name in set(content["weight_map"].values())}
    assert {len(name) for name in longest.values()} == {249}
    for name, long in longest.items():
        (small / name).rename(small / long)
    content["weight_map"] = {tensor: longest[name] for tensor, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("what", ["fsync", "posix_fallocate"])
def test_file_system_without_a_call_that_can_be_missed_is_written_to(
    what: str, number: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of a network can't sync folders, or claim room."""
    original = getattr(os, what)

    def refuse(descriptor: int, *args: int) -> None:
        if what == "posix_fallocate" or os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        original(descriptor, *args)

    monkeypatch.setattr(os, what, refuse)
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


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


def test_file_system_that_does_not_tell_its_size_is_not_called_full(small: Path, tmp_path: Path) -> None:
    disk = tmp_path / "ramfs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "ramfs", "ramfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        octavo.convert(small, disk / "out")
        assert octavo.verify(disk / "out", small).ok
    finally:
        subprocess.run(["umount", disk], check=True)


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
    conversions.start(source, disk / "out", trap=("os", "fsync", "", 3))
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


# -- weights and formats ----------------------------------------------------------------------------------------------


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
    shutil.rmtree(tmp_path / "out.partial")
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


def test_unknown_format_leaves_nothing_behind(small: Path, tmp_path: Path) -> None:
    fails(RecipeError, "unknown format", lambda: octavo.convert(small, tmp_path / "out", format="awq"))
    fails(RecipeError, "has no mxfp8", lambda: octavo.convert(small, tmp_path / "out", "mxfp8", format="fp8"))
    fails(RecipeError, "unknown scheme", lambda: octavo.convert(small, tmp_path / "out", "int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
