"""Errors of others on the way through the public functions: those of the system are told, those of users pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _inputs import fails

import octavo
from octavo.errors import CheckpointError, DeviceError, OutputError

#: function -> a call of it with a progress
CALLS: dict[str, Callable[[Path, Path, Any], Any]] = {
    "convert": lambda source, target, progress: octavo.convert(source, target, progress=progress),
    "verify": lambda source, target, progress: octavo.verify(target, source, progress=progress),
    "stream": lambda source, _, progress: list(octavo.stream(source, progress=progress)),
}


@pytest.fixture
def converted(small: Path, tmp_path: Path) -> Path:
    octavo.convert(small, tmp_path / "converted", progress=False)
    return tmp_path / "converted"


@pytest.mark.parametrize("error", [OSError(28, "theirs"), MemoryError("theirs"), RecursionError("theirs")])
@pytest.mark.parametrize("name", CALLS)
def test_what_progress_raises_comes_out_as_it_is(name: str, error: Exception, small: Path, converted: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise error

    target = converted if name == "verify" else converted.with_name("out")
    with pytest.raises(type(error)) as caught:
        CALLS[name](small, target, progress)
    assert caught.value is error


def test_what_progress_of_a_load_raises_comes_out_as_it_is(llama: Path) -> None:
    error = OSError(28, "theirs")

    def progress(done: int, total: int) -> None:
        raise error

    with pytest.raises(OSError, match="theirs") as caught:
        octavo.load(llama, progress=progress)
    assert caught.value is error


@pytest.mark.parametrize("name", ["convert", "stream"])
def test_threads_that_cannot_be_started_are_counted(
    name: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    says = ("starts no more threads", "run here already", "threads=1", "ulimit -u")
    fails(DeviceError, says, lambda: CALLS[name](small, tmp_path / "out", False or None))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("a\0b", "without NUL characters"),
        (5, "not a path here"),
        ("~no_such_user/x", "home directory"),
        ("x" * 300, "too long"),
    ],
)
def test_target_that_can_be_no_path_is_named(target: Any, says: str, small: Path, tmp_path: Path) -> None:
    where = tmp_path / target if isinstance(target, str) and not target.startswith("~") else target
    fails(OutputError, says, lambda: octavo.convert(small, where))


def test_saved_recipe_of_another_type_names_the_config(llama: Path) -> None:
    import json

    config = json.loads((llama / "config.json").read_text())
    for wrong in ({"targets": 5}, {"weights": 5}, {"self": 5}, {"scheme": {}}):
        config["quantization_config"] = {"quant_method": "octavo", **wrong}
        (llama / "config.json").write_text(json.dumps(config))
        fails(CheckpointError, ("config.json: quantization_config:",), lambda: octavo.load(llama))
