"""The process in which vLLM is asked: where it ends, takes too long, or is not waited for, the conversion goes on."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import octavo
from octavo.adapters.vllm.reader import VllmReader
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import MissingExtraError

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="here is none that has no vLLM")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"up.weight": torch.ones(64, 64, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "none", "architectures": ["None"]}')
    return tmp_path


def judge(reader: VllmReader, folder: Path) -> Any:
    checkpoint = Checkpoint.open(folder)
    return reader.judge(checkpoint, checkpoint.tensors, {}, checkpoint.config)


def test_its_last_words_are_quoted(folder: Path) -> None:
    reader = VllmReader()
    for _ in range(2):
        assert judge(reader, folder).unproved == "its process ended with 1: ModuleNotFoundError: No module named 'vllm'"


def test_it_is_ended_when_it_takes_too_long(folder: Path) -> None:
    reader = VllmReader(limit_s=0)
    assert judge(reader, folder).unproved == "it did not answer within 0 s"
    assert reader._process.returncode == -signal.SIGKILL
    assert judge(reader, folder).unproved == "its process was ended"


def test_it_is_ended_when_waiting_is_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def get(self, timeout: float) -> bytes:
            raise KeyboardInterrupt

    reader = VllmReader()
    monkeypatch.setattr(reader, "_answers", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        judge(reader, folder)
    assert reader._process.returncode == -signal.SIGKILL


def test_it_ends_with_its_reader() -> None:
    reader = VllmReader()
    process = reader._process
    del reader
    assert process.returncode == -signal.SIGKILL


def test_where_vllm_is_not_installed_that_is_said(folder: Path) -> None:
    report = octavo.convert(folder, folder / "out")
    assert "not proved for vLLM: it is not installed" in report.notes
    with pytest.raises(MissingExtraError, match=r"asking vLLM needs .* pip install 'octavo\[vllm\]'"):
        octavo.verify(folder / "out", reader="vllm")
