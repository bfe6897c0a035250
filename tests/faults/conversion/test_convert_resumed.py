"""Conversions interrupted, and what may have changed when the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from _conversions import CONFIG, MIB, Stopped, cli, same_files, states, stop_after, tensors_of_size
from _inputs import fails
from safetensors.torch import load_file, save_file

import octavo
from helpers import random_weights, write_checkpoint
from helpers.folders import tensors_of
from octavo.errors import CheckpointError, OutputError, SourceChangedError

# -- interrupted ------------------------------------------------------------------------------------------------------


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
    assert stderr.splitlines() == [f"{partial} keeps what is finished: the same command goes on", "interrupted"]
    before = states(partial / "checkpoint")
    recorded = json.loads((partial / "manifest.json").read_text())["finished"]
    assert 0 < len(recorded) < 8
    octavo.convert(source, dst)
    assert {name: states(dst)[name] for name in recorded} == {name: before[name] for name in recorded}
    assert same_files(dst, tmp_path / "undisturbed")


def test_stacks_of_experts_that_are_cut_go_on_too(tmp_path: Path) -> None:
    tensors = {}
    for layer in range(3):
        base = f"model.layers.{layer}.mlp.experts"
        tensors[f"{base}.gate_up_proj"] = random_weights((4, 96, 256), torch.bfloat16, 2 * layer)  # [experts, in, out]
        tensors[f"{base}.down_proj"] = random_weights((4, 128, 96), torch.bfloat16, 2 * layer + 1)
    source = write_checkpoint(tmp_path / "source", tensors, 3, CONFIG)
    octavo.convert(source, tmp_path / "undisturbed")
    dst = tmp_path / "out"
    stop_after(1, source, dst)
    octavo.convert(source, dst)
    assert same_files(dst, tmp_path / "undisturbed")
    assert len(tensors_of(dst)) == 2 * 3 * 4 * 3
    assert octavo.verify(dst, source).ok


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
    shutil.rmtree(tmp_path / "out.partial")
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


def test_conversion_that_another_version_began_is_not_called_one_with_other_options(
    small: Path, tmp_path: Path
) -> None:
    stop_after(1, small, tmp_path / "out")
    manifest = tmp_path / "out.partial" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "bytes_version": 99}))
    text = fails(OutputError, ["another version", "remove"], lambda: octavo.convert(small, tmp_path / "out"))
    assert "options" not in text


def test_options_that_leave_the_bytes_alone_may_change(small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out", threads=1, staging_bytes=MIB)
    octavo.convert(small, tmp_path / "out", threads=3, staging_bytes=9 * MIB)
    octavo.convert(small, tmp_path / "undisturbed")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


def test_small_files_that_vanished_since_the_interruption_are_not_published(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "tokenizer.json").write_text("{}")

    def failing(*_: Any, **__: Any) -> None:
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
        b"[" * 100_000,
        b'{"files": [], "finished": {}, "files": []}',
        b'{"files": [], "finished": {}, "a": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"files": [], "finished": {}, "a": ' + b"9" * 5000 + b"}",
    ],
)
def test_damaged_manifest_is_refused_with_advice(content: bytes, small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    stop_after(1, small, dst)
    (tmp_path / "out.partial" / "manifest.json").write_bytes(content)
    fails(OutputError, ["manifest.json", "damaged", "remove"], lambda: octavo.convert(small, dst))
    assert not dst.exists()


def test_small_file_that_a_manifest_calls_finished_is_copied_anew(small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out")
    partial = tmp_path / "out.partial"
    manifest = json.loads((partial / "manifest.json").read_text())
    manifest["finished"]["config.json"] = 3
    (partial / "manifest.json").write_text(json.dumps(manifest))
    (partial / "checkpoint" / "config.json").write_text("abc")
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok


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
