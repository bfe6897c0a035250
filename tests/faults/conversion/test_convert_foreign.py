"""Conversions beside files that octavo did not make: all of these are still there, and unchanged, when it has ended."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from _conversions import CONFIG, Conversions, Trap, same_files, stop_after, tensors_of_size
from _inputs import copy_of, fails

import octavo
from helpers import write_checkpoint
from octavo.errors import OutputError

FOLDER = "octavo.conversion.folder:Folder"

FIRST = "checkpoint/model-00001-of-00003.safetensors"
LAST = "checkpoint/model-00003-of-00003.safetensors"


def everything(folder: Path) -> dict[str, str | bytes | None]:
    """Path -> content of a file, target of a link, None for a folder."""
    found: dict[str, str | bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


# -- the source is where octavo would write ---------------------------------------------------------------------------


@pytest.mark.parametrize("lock", ["lock", "octavo.lock"])
@pytest.mark.parametrize("way", ["by name", "by a link to it", "through a link to its parent", "a folder of links"])
def test_source_that_is_the_partial_folder_is_refused(lock: str, way: str, small: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    write(copy_of(small, place / "qwen.partial"), lock, "checkpoint/optimizer.bin", "runs/log")
    source, dst = place / "qwen.partial", place / "qwen"
    if way == "by a link to it":
        source = tmp_path / "link"
        source.symlink_to(place / "qwen.partial")
    elif way == "through a link to its parent":
        (tmp_path / "other").symlink_to(place)
        dst = tmp_path / "other" / "qwen"
    elif way == "a folder of links":
        source = tmp_path / "links"
        source.mkdir()
        for file in (place / "qwen.partial").iterdir():
            (source / file.name).symlink_to(file)
    before = everything(tmp_path)
    fails(OutputError, ["qwen.partial", "holds the source"], lambda: octavo.convert(source, dst))
    assert everything(tmp_path) == before


def test_source_inside_the_partial_folder_is_refused(small: Path, tmp_path: Path) -> None:
    """Even where the folder is octavo's own."""
    stop_after(2, small, tmp_path / "out")
    source = write_checkpoint(tmp_path / "out.partial" / "checkpoint", tensors_of_size(1, 96), 1, CONFIG)
    before = everything(tmp_path)
    fails(OutputError, "holds the source", lambda: octavo.convert(source, tmp_path / "out", None))
    fails(OutputError, "holds the source", lambda: octavo.convert(source / "model.safetensors", tmp_path / "out", None))
    assert everything(tmp_path) == before


def test_source_beside_or_around_the_target_is_no_trouble(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "undisturbed")
    octavo.convert(small, small / "inside")
    assert same_files(small / "inside", tmp_path / "undisturbed")
    assert not (small / "inside.partial").exists()


# -- the partial folder is somebody else's ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["notes.txt"],
        ["lock"],
        ["lock", "manifest.json", "checkpoint/optimizer.bin"],
        ["octavo.lock"],
        ["octavo.lock", "checkpoint/optimizer.bin"],
        ["manifest.json"],
        ["manifest.json.part"],
        ["checkpoint/optimizer.bin"],
    ],
    ids=lambda names: " ".join(names).replace("/", "_"),
)
def test_partial_folder_that_octavo_did_not_make_is_refused(names: list[str], small: Path, tmp_path: Path) -> None:
    write(tmp_path / "out.partial", *names)
    before = everything(tmp_path)
    fails(OutputError, ["out.partial", names[0].split("/")[0], "Move"], lambda: octavo.convert(small, tmp_path / "out"))
    assert everything(tmp_path) == before


def test_empty_files_are_no_mark(small: Path, tmp_path: Path) -> None:
    partial = write(tmp_path / "out.partial", "checkpoint/mine")
    (partial / "octavo.lock").touch()
    before = everything(tmp_path)
    fails(OutputError, ["octavo.lock", "checkpoint"], lambda: octavo.convert(small, tmp_path / "out"))
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "runs/log",
        "lock",
        "checkpoint/notes.txt",
        "checkpoint/runs/log",
        "checkpoint/tokenizer.json",
        "checkpoint/config.json.part",
        "checkpoint/model-00007-of-00007.safetensors",
    ],
)
def test_foreign_file_in_an_interrupted_conversion_is_refused_and_kept(name: str, small: Path, tmp_path: Path) -> None:
    dst, partial = tmp_path / "out", tmp_path / "out.partial"
    stop_after(1, small, dst)
    write(partial, name)
    before = everything(tmp_path)
    found = name.removeprefix("checkpoint/").split("/")[0]
    fails(OutputError, ["out.partial", found, "Move"], lambda: octavo.convert(small, dst))
    assert everything(tmp_path) == before
    shutil.move(partial / ("checkpoint" if name.startswith("checkpoint/") else "") / found, tmp_path / "moved")
    octavo.convert(small, dst)
    octavo.convert(small, tmp_path / "undisturbed")
    assert same_files(dst, tmp_path / "undisturbed")
    assert not partial.exists()


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
@pytest.mark.parametrize(
    "name",
    ["", "octavo.lock", "lock", "manifest.json", "manifest.json.part", "checkpoint", FIRST, LAST, LAST + ".part"],
)
@pytest.mark.parametrize("interrupted", [False, True], ids=["anew", "interrupted"])
def test_planted_link_is_not_followed(interrupted: bool, name: str, target: str, small: Path, tmp_path: Path) -> None:
    home = write(tmp_path / "home", "a", "b/c")
    partial, link = tmp_path / "out.partial", tmp_path / "out.partial" / name
    if interrupted:
        stop_after(1, small, tmp_path / "out")
        if os.path.lexists(link):
            link.rename(tmp_path / "moved")  # and what the link stands for is no less complete
            home = tmp_path / "moved" if target == "folder" and link.name in ("", "checkpoint") else home
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to({"folder": home, "file": home / "a", "nothing": tmp_path / "nowhere"}[target])
    before = everything(tmp_path)
    fails(
        OutputError,
        ["out.partial", "link" if link.parent == partial else ""],
        lambda: octavo.convert(small, tmp_path / "out"),
    )
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "",
        "manifest.json",
        "manifest.json.part",
        "checkpoint",
        LAST,
        LAST + ".part",
        "checkpoint/config.json",
        "checkpoint/config.json.part",
        "checkpoint/tokenizer.json",
        "checkpoint/model.safetensors.index.json",
    ],
)
def test_link_planted_while_a_conversion_runs_is_not_followed(name: str, small: Path, tmp_path: Path) -> None:
    write(small, "tokenizer.json")
    home = write(tmp_path / "home", "a", "b/c")
    kept = everything(home)
    link = tmp_path / "out.partial" / name
    planted = False

    def progress(done: int, of: int) -> None:
        nonlocal planted
        if not planted:
            planted = True
            if os.path.lexists(link):
                link.rename(tmp_path / "moved")
            link.symlink_to(home if name in ("", "checkpoint") else home / "a")

    try:
        octavo.convert(small, tmp_path / "out", progress=progress)
    except OutputError:
        assert not (tmp_path / "out").exists()
    else:  # a link that is in nobody's way, or gone itself
        assert not (tmp_path / "out").is_symlink()
        assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
        assert octavo.verify(tmp_path / "out", small).ok
    assert planted
    assert everything(home) == kept


@pytest.mark.parametrize("name", [LAST, "checkpoint/tokenizer.json", "checkpoint/config.json", "checkpoint/notes.txt"])
def test_file_put_into_the_folder_while_a_conversion_runs_is_kept(name: str, small: Path, tmp_path: Path) -> None:
    write(small, "tokenizer.json")
    partial = tmp_path / "out.partial"
    text = fails(
        OutputError,
        "out.partial",
        lambda: octavo.convert(small, tmp_path / "out", progress=lambda *_: write(partial, name)),
    )
    assert not (tmp_path / "out").exists(), text
    assert (partial / name).read_text() == "mine"


def test_empty_folder_that_takes_the_name_of_the_target_meanwhile_is_kept(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    fails(
        OutputError,
        [str(dst), "exists"],
        lambda: octavo.convert(small, dst, progress=lambda *_: dst.mkdir(exist_ok=True)),
    )
    assert list(dst.iterdir()) == []


def test_folder_that_takes_the_name_of_the_partial_one_meanwhile_is_kept(small: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"

    def progress(done: int, of: int) -> None:
        if not (tmp_path / "moved").exists():
            partial.rename(tmp_path / "moved")
            partial.mkdir()

    octavo.convert(small, tmp_path / "out", progress=progress)
    assert octavo.verify(tmp_path / "out", small).ok
    assert partial.is_dir()


def test_second_name_of_a_file_is_not_written_through(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "out.partial").mkdir()
    os.link(tmp_path / "empty", tmp_path / "out.partial" / "octavo.lock")
    fails(OutputError, "octavo.lock", lambda: octavo.convert(small, tmp_path / "out"))
    assert (tmp_path / "empty").read_bytes() == b""


# -- killed early -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trap",
    [
        pytest.param((FOLDER, "opener", "octavo.lock", 1), id="the folder is made, the lock is not"),
        pytest.param(("fcntl", "flock", "", 1), id="the lock is made, and empty"),
        pytest.param(("os", "fsync", "", 1), id="the mark is made, not synced"),
        pytest.param(("os", "mkdir", "checkpoint", 1), id="the lock is complete"),
        pytest.param((FOLDER, "write", "manifest", 1), id="there is no manifest"),
        pytest.param(("os", "replace", "manifest", 1), id="the manifest is not renamed"),
        pytest.param((FOLDER, "opener", "00001-of", 1), id="there is no shard"),
    ],
)
def test_conversion_killed_before_it_wrote_a_shard_goes_on(
    trap: Trap, conversions: Conversions, small: Path, tmp_path: Path
) -> None:
    octavo.convert(small, tmp_path / "undisturbed")
    conversions.start(small, tmp_path / "out", trap=trap)
    assert conversions.wait() == -signal.SIGKILL
    assert (tmp_path / "out.partial").is_dir()
    octavo.convert(small, tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_mark_is_completed_where_nothing_else_is(
    share: float, conversions: Conversions, small: Path, tmp_path: Path
) -> None:
    conversions.start(small, tmp_path / "out", trap=("os", "mkdir", "checkpoint", 1))
    assert conversions.wait() == -signal.SIGKILL
    lock = tmp_path / "out.partial" / "octavo.lock"
    os.truncate(lock, int(share * lock.stat().st_size))
    octavo.convert(small, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", small).ok
    assert not (tmp_path / "out.partial").exists()


def test_conversion_removes_no_tree(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a folder was removed with all that it holds")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    stop_after(1, small, tmp_path / "out")
    octavo.convert(small, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]
