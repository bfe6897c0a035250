"""Sources that are others than they seem: equal in names, sizes and times but not in bytes, or in bytes alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _conversions import CONFIG, same_files, states, stop_after, tensors_of_size
from _inputs import fails

import octavo
from helpers import random_weights, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import source as marks
from octavo.errors import OutputError, SourceChangedError

FIRST = "model-00001-of-00003.safetensors"


def frozen_times(folder: Path) -> Path:
    """All times alike, as in tar archives that can be reproduced, and in nix."""
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    return folder


@pytest.fixture
def versions(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two models of the same names, shapes, sizes and times."""
    other = {name: -tensor for name, tensor in tensors_of_size(3, 96).items()}
    return frozen_times(small), frozen_times(write_checkpoint(tmp_path / "other", other, 3, CONFIG))


def replace(folder: Path, by: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def overwrite(folder: Path, by: Path) -> None:
    """The same files, with other bytes, whose times are restored."""
    for file in folder.iterdir():
        file.write_bytes((by / file.name).read_bytes())
    frozen_times(folder)


def move(folder: Path, by: Path) -> None:
    shutil.rmtree(folder)
    by.rename(folder)


@pytest.mark.parametrize("change", [replace, overwrite, move])
def test_other_model_with_the_same_sizes_and_times_is_refused(
    change: Callable[[Path, Path], None], versions: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = versions
    stop_after(2, first, tmp_path / "out")
    change(first, second)
    text = fails(SourceChangedError, ["out.partial", "Remove"], lambda: octavo.convert(first, tmp_path / "out"))
    assert f"{FIRST} has another content" in text
    shutil.rmtree(tmp_path / "out.partial")
    octavo.convert(first, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", first).ok


def test_link_that_was_pointed_elsewhere_is_refused(versions: tuple[Path, Path], tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(versions[0])
    stop_after(2, link, tmp_path / "out")
    link.unlink()
    link.symlink_to(versions[1])
    fails(SourceChangedError, "another content", lambda: octavo.convert(link, tmp_path / "out"))


@pytest.mark.parametrize("copy", [shutil.copytree, os.rename, os.symlink], ids=["copied", "moved", "linked"])
def test_same_source_elsewhere_goes_on(copy: Callable[[Path, Path], Any], small: Path, tmp_path: Path) -> None:
    """What counts is the content; a copy has other inodes, and another time of change."""
    octavo.convert(small, tmp_path / "undisturbed")
    stop_after(2, small, tmp_path / "out")
    before = states(tmp_path / "out.partial" / "checkpoint")
    copy(small, tmp_path / "elsewhere")
    report = octavo.convert(tmp_path / "elsewhere", tmp_path / "out")
    assert any("another file by now" in note and FIRST in note for note in report.notes) is (copy is shutil.copytree)
    after = states(tmp_path / "out")
    assert len(before) == 2
    assert {name: after[name] for name in before} == before
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")


def test_file_that_was_touched_in_its_place_is_converted_again(tmp_path: Path) -> None:
    """A weight between the samples is another one, and the time of modification is restored."""
    tensors = {f"m.{n}.weight": random_weights((64, 512), torch.bfloat16, n) for n in range(3)}
    source = frozen_times(write_checkpoint(tmp_path / "source", tensors, 3, CONFIG))
    stop_after(2, source, tmp_path / "out")
    before = states(tmp_path / "out.partial" / "checkpoint")
    file = source / FIRST
    raw = bytearray(file.read_bytes())
    raw[9 + int.from_bytes(raw[:8], "little")] ^= 0x80  # the sign of the first weight
    file.write_bytes(raw)
    os.utime(file, (1, 1))
    report = octavo.convert(source, tmp_path / "out")
    after = states(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == [FIRST]
    assert any("written again" in note and FIRST in note for note in report.notes)
    assert octavo.verify(tmp_path / "out", source).ok


def test_config_and_tokenizer_are_those_of_the_last_run(small: Path, tmp_path: Path) -> None:
    """They are written anew, so that mending them is no reason to begin anew."""
    (small / "tokenizer.json").write_text("{}")
    stop_after(1, small, tmp_path / "out")
    (small / "tokenizer.json").write_text('{"mended": true}')
    octavo.convert(small, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"mended": true}'


@pytest.mark.parametrize("name", [FIRST, "model-00003-of-00003.safetensors", "tokenizer.json", "config.json", "folder"])
@pytest.mark.parametrize("done", [0.1, 1.0])
def test_source_that_becomes_another_model_meanwhile_is_noticed(
    name: str, done: float, versions: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing is published that is partly of one model, and partly of another."""
    first, second = versions
    for number, folder in enumerate(versions):
        (folder / "tokenizer.json").write_text(f"{number}")
        (folder / "config.json").write_text(f'{{"model_type": "llama", "hidden_size": {number}}}')
        frozen_times(folder)
    link = tmp_path / "latest"
    link.symlink_to(first)
    changed: list[bool] = []

    def progress(at: int, of: int) -> None:
        if at >= done * of and not changed:
            changed.append(True)
            if name == "folder":
                link.unlink()
                link.symlink_to(second)
            else:
                os.replace(second / name, first / name)

    fails(SourceChangedError, "", lambda: octavo.convert(link, tmp_path / "out", progress=progress))
    assert changed
    assert not (tmp_path / "out").exists()


def test_shard_that_is_replaced_between_looking_and_opening_is_noticed(
    versions: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = versions
    original = os.open

    def late(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).endswith(f"small/{FIRST}") and (second / FIRST).exists():
            os.replace(second / FIRST, first / FIRST)
        return original(path, flags, *args, **options)

    checkpoint = Checkpoint.open(first)
    monkeypatch.setattr(Checkpoint, "open", lambda *_: checkpoint)
    monkeypatch.setattr(marks, "marks_of", lambda _: {})
    monkeypatch.setattr(os, "open", late)
    fails(SourceChangedError, f"{FIRST}: changed", lambda: octavo.convert(first, tmp_path / "out"))


@pytest.mark.parametrize("found", [None, 7, [], {}, {"x": 1}, {"x": []}, {"x": [1, 2]}, {FIRST: [1, 2, 3, 4, 5]}])
def test_manifest_whose_marks_are_damaged_is_refused(found: Any, small: Path, tmp_path: Path) -> None:
    stop_after(1, small, tmp_path / "out")
    manifest = tmp_path / "out.partial" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "source": found}))
    with pytest.raises((OutputError, SourceChangedError), match=r"out\.partial.* [Rr]emove"):
        octavo.convert(small, tmp_path / "out")
