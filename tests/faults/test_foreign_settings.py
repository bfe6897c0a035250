"""What a program has set for its own tensors and terminal changes no byte of octavo's, and is no traceback."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import fails
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import octavo
from octavo.errors import DeviceError

SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "another device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}
FAKED: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda source, _: octavo.load(source),
    "plan": lambda source, _: octavo.plan(source),
    "convert": octavo.convert,
    "verify": lambda source, _: octavo.verify(source, source),
    "stream": lambda source, _: octavo.stream(source),
    "update": lambda *_: octavo.update(torch.nn.Linear(8, 8), {}),
    "layerwise": lambda *_: octavo.layerwise(torch.nn.Linear(8, 8)),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_model_is_what_it_is_without_and_can_be_updated(setting: Any, llama: Path) -> None:
    expected = octavo.load(llama).state_dict()
    with setting():
        model = octavo.load(llama)
    octavo.update(model, load_file(llama / "model.safetensors"))
    for name, tensor in model.state_dict().items():
        assert (tensor.device.type, tensor.is_inference()) == ("cpu", False), name
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_conversion_is_what_it_is_without(setting: Any, small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "expected")
    with setting():
        octavo.convert(small, tmp_path / "out")
        assert octavo.verify(tmp_path / "out", small).ok
        assert {tensor.device.type for _, tensor in octavo.stream(small)} == {"cpu"}
    for file in (tmp_path / "expected").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize("call", FAKED.values(), ids=FAKED)
def test_tensors_without_values_are_refused(call: Any, llama: Path, tmp_path: Path) -> None:
    with FakeTensorMode():
        fails(DeviceError, "a FakeTensorMode is active", lambda: call(llama, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["none", "closed", "unlike a file"])
def test_without_a_terminal_to_ask_there_is_no_bar(
    kind: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "unlike a file": object()}[kind])
    octavo.convert(small, tmp_path / "out")


def test_the_command_converts_where_stderr_is_closed(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo", "convert", str(small), str(tmp_path / "out")]
    found = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0
    assert f"written: {tmp_path / 'out'}" in found.stdout
