"""Conversions that are interrupted again and again: the lock is held until nothing writes any more."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _conversions import CONFIG, Stopped, same_files, stop_after
from _inputs import fails

import octavo
from helpers import random_weights, write_checkpoint
from octavo import cli as commands
from octavo.conversion.partial import PartialFolder
from octavo.errors import OutputError


def path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


@pytest.mark.parametrize("stuck", ["syncing", "writing", "reading"])
def test_interrupts_while_the_disk_hangs_leave_no_thread_that_writes_later(
    stuck: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs never write to one folder at a time, though the first was interrupted three times."""
    octavo.convert(small, tmp_path / "undisturbed")
    dst, main = tmp_path / "out", threading.main_thread().ident
    assert main is not None
    function, part = {
        "syncing": ("fsync", "00001-of-00003.safetensors.part"),
        "writing": ("pwrite", "00002-of-00003.safetensors.part"),
        "reading": ("preadv", "00002-of-00003.safetensors"),
    }[stuck]
    hanging, go_on, refused = threading.Event(), threading.Event(), []
    original = getattr(os, function)

    def hang(descriptor: int, *args: object) -> object:
        # the header is written by the calling thread
        elsewhere = threading.current_thread() is not threading.main_thread()
        if not go_on.is_set() and elsewhere and path_of(descriptor).endswith(part):
            hanging.set()
            go_on.wait()
        return original(descriptor, *args)

    def interrupt() -> None:
        hanging.wait()
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        try:
            octavo.convert(small, dst)
        except OutputError as error:
            refused.append(str(error))
        go_on.set()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, hang)
        with pytest.raises(KeyboardInterrupt):
            octavo.convert(small, dst, threads=2)
        patch.undo()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo")]
    interrupter.join()
    assert len(refused) == 1
    assert "another process is converting into it" in refused[0]
    octavo.convert(small, dst)
    assert same_files(dst, tmp_path / "undisturbed")


def test_second_interrupt_leaves_out_shards_that_are_not_being_synced(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, original = threading.main_thread().ident, os.fsync
    assert main is not None
    hanging, go_on = threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        if path_of(descriptor).endswith("00001-of-00003.safetensors.part"):
            hanging.set()
            go_on.wait()
        original(descriptor)

    def interrupt() -> None:
        hanging.wait()
        time.sleep(0.2)  # by then, the others are complete, too
        for _ in range(2):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
        go_on.set()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", hang)
        with pytest.raises(KeyboardInterrupt):
            octavo.convert(small, tmp_path / "out")
    interrupter.join()
    names = [path.name for path in (tmp_path / "out.partial" / "checkpoint").glob("*.safetensors")]
    assert names == ["model-00001-of-00003.safetensors"]
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


def test_slow_disk_leaves_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards there are, the process may open only so many files."""
    tensors = {f"m.{number}.weight": random_weights((8, 8), torch.bfloat16, number) for number in range(60)}
    source = write_checkpoint(tmp_path / "source", tensors, 60, CONFIG)
    original, opened = os.fsync, []

    def slowly(descriptor: int) -> None:
        time.sleep(0.02 if path_of(descriptor).endswith(".part") else 0)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", slowly)
    before = len(os.listdir("/proc/self/fd"))
    octavo.convert(
        source, tmp_path / "out", None, progress=lambda done, of: opened.append(len(os.listdir("/proc/self/fd")))
    )
    assert max(opened) - before < 40
    assert octavo.verify(tmp_path / "out", source).ok


def test_run_that_is_over_can_change_nothing_in_its_folder(small: Path, tmp_path: Path) -> None:
    """Should anything of it go on, in spite of all: its descriptors are closed, its files have names of their own."""
    held: list[PartialFolder] = []
    original = PartialFolder.take_up

    def take_up(partial: PartialFolder, *args: Any, **options: Any) -> None:
        held.append(partial)
        original(partial, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFolder, "take_up", take_up)
        stop_after(1, small, tmp_path / "out")
        stop_after(2, small, tmp_path / "out")
    first, second = held
    shard = "model-00003-of-00003.safetensors"
    assert first.part_of(shard) != second.part_of(shard)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("*")}
    for partial in held:
        with pytest.raises(OSError, match="Bad file descriptor"):
            partial.finish(shard, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            partial._write_manifest()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("*")} == before


@pytest.mark.filterwarnings("ignore:.*fork")
def test_process_forked_during_a_conversion_does_not_keep_the_lock(small: Path, tmp_path: Path) -> None:
    children: list[int] = []

    def progress(done: int, of: int) -> None:
        if not children:
            children.append(os.fork())
            if not children[0]:
                signal.pause()
        raise Stopped

    with pytest.raises(Stopped):
        octavo.convert(small, tmp_path / "out", progress=progress)
    try:
        octavo.convert(small, tmp_path / "out")
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
    fails(OutputError, "exists already", lambda: octavo.convert(small, tmp_path / "out"))


# -- interrupted when all is done -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["rename", "unlink", "rmdir"])
def test_interrupt_after_the_last_rename_says_that_the_result_is_complete(
    step: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing beside it."""
    octavo.convert(small, tmp_path / "undisturbed")
    dst, original = tmp_path / "out", getattr(os, step)
    sent: list[int] = []

    def interrupted(*args: Any, **options: Any) -> None:
        original(*args, **options)
        if dst.exists() and not sent:
            sent.append(os.getpid())
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupted)
        with pytest.raises(KeyboardInterrupt, match="out is complete"):
            octavo.convert(small, dst)
    assert sent
    assert same_files(dst, tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("moment", ["while it is published", "while it is told"])
def test_command_that_is_interrupted_when_all_is_done_says_so_and_exits_0(
    moment: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    if moment == "while it is told":
        monkeypatch.setattr(commands, "say_written", interrupt)
    else:
        monkeypatch.setattr(PartialFolder, "_leave", interrupt)
    monkeypatch.setattr(commands, "give_up_output", lambda: None)
    monkeypatch.setattr("sys.argv", ["octavo", "convert", str(small), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    said = capsys.readouterr().err
    assert "out is complete" in said
    assert "interrupted" not in said
    assert ended.value.code in (None, 0)
    assert octavo.verify(tmp_path / "out", small).ok


def test_folder_that_another_made_meanwhile_is_not_called_complete(small: Path, tmp_path: Path) -> None:
    def progress(done: int, of: int) -> None:
        (tmp_path / "out").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        octavo.convert(small, tmp_path / "out", progress=progress)
    assert interrupt.value.args == ()
