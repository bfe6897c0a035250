"""Fixtures of the integration tests: sources of conversions, and models of transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _sources import CONFIG, source_tensors

import octavo
from helpers import write_checkpoint
from helpers.models import add_tokenizer

if TYPE_CHECKING:
    from _models import Checkpoints


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What outlasts a power cut is not asked here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> path of a bf16 source: ``single`` folder, ``sharded`` folder (three files), or a lone ``file``."""
    root = tmp_path_factory.mktemp("sources")
    write_checkpoint(root / "single", source_tensors(), 1, CONFIG)
    write_checkpoint(root / "sharded", source_tensors(), 3, CONFIG)
    return lambda layout: root / ("single/model.safetensors" if layout == "file" else layout)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    from _models import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that knows every byte; not to be changed."""
    from _models import make_checkpoint

    folder = make_checkpoint(
        "llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=128, intermediate_size=200
    )
    add_tokenizer(folder, 260)
    return folder


@pytest.fixture(scope="session")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What converting `llama` gives; not to be changed."""
    dst = tmp_path_factory.mktemp("converted") / "out"
    octavo.convert(llama, dst)
    return dst
