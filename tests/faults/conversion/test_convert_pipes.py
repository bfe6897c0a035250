"""Named pipes, sockets and devices in place of files: nothing waits for their other end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from _conversions import stop_after
from _inputs import fails

import octavo
from octavo.errors import CheckpointError, OctavoError, OutputError, SourceChangedError

pytestmark = pytest.mark.timeout(60)

THIRD = "model-00003-of-00003.safetensors"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # such paths are short
        bound.bind(path.name)
        os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return KINDS[request.param]


@pytest.mark.parametrize("name", ["octavo.lock", "manifest.json", "manifest.json.part", f"checkpoint/{THIRD}"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["anew", "interrupted"])
def test_in_the_partial_folder_it_is_refused(
    interrupted: bool, name: str, kind: Callable[[Path], None], small: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    if interrupted:
        stop_after(1, small, tmp_path / "out")
    (partial / name).unlink(missing_ok=True)
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    kind(partial / name)
    fails(OutputError, "out.partial", lambda: octavo.convert(small, tmp_path / "out"))
    assert os.path.lexists(partial / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", THIRD])
def test_in_the_source_it_is_refused(name: str, kind: Callable[[Path], None], small: Path, tmp_path: Path) -> None:
    (small / name).unlink()
    kind(small / name)
    fails(CheckpointError, name, lambda: octavo.convert(small, tmp_path / "out"))


def test_beside_the_weights_it_is_not_copied(kind: Callable[[Path], None], small: Path, tmp_path: Path) -> None:
    kind(small / "tokenizer.json")
    octavo.convert(small, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out" / "tokenizer.json")


@pytest.mark.parametrize("name", [THIRD, "tokenizer.json", "config.json"])
def test_in_place_of_a_file_that_was_there_it_is_noticed(
    name: str, kind: Callable[[Path], None], small: Path, tmp_path: Path
) -> None:
    (small / "tokenizer.json").write_text("{}")

    def progress(done: int, of: int) -> None:
        if done < of and not (tmp_path / "moved").exists():
            (small / name).rename(tmp_path / "moved")
            kind(small / name)

    with pytest.raises(OctavoError, match=name) as error:
        octavo.convert(small, tmp_path / "out", progress=progress)
    assert isinstance(error.value, SourceChangedError) or name == "config.json"
    assert not (tmp_path / "out").exists()
