"""Fixtures of the fault tests: sound tiny models and conversions to break, and a guard against reading weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _conversions import CONFIG, SHARDS, SLOWLY, Conversions, tensors_of_size
from _inputs import copy_of

import octavo
from helpers import write_checkpoint
from helpers.models import random_model
from octavo.streaming import readahead as ahead


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights, by `os.preadv` as the ring does, fails in a way that is no `OctavoError`; none is read ahead."""

    def refuse(*_: Any) -> int:
        raise AssertionError("a weight byte was read")

    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(ahead, "available_bytes", lambda: 0)


@pytest.fixture(autouse=True)
def after_every_fault(nothing_left_behind: None) -> None:
    """All of octavo's threads have ended, and all of its files are closed."""


@pytest.fixture(params=[True, False], ids=["direct", "layer"])
def direct(request: pytest.FixtureRequest) -> bool:
    """Whether weights that are loaded layer by layer are quantized as they come, or when their layer is complete."""
    return request.param


def _make(folder: Path, config_class: str, **options: Any) -> Path:
    pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    random_model(config_class, {**sizes, **heads, **options}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> folder of a sound model; not to be changed."""
    root, made = tmp_path_factory.mktemp("sound"), {}
    moe = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    }
    gpt_oss = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    recipes = {
        "llama": lambda folder: _make(folder, "LlamaConfig"),
        "qwen2_moe": lambda folder: _make(folder, "Qwen2MoeConfig", **moe, decoder_sparse_step=1),
        "gpt_oss": lambda folder: _make(folder, "GptOssConfig", **gpt_oss),
    }

    def get(name: str) -> Path:
        if name not in made:
            made[name] = recipes[name](root / name)
        return made[name]

    return get


@pytest.fixture
def llama(sound: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Llama, to be broken."""
    return copy_of(sound("llama"), tmp_path / "llama")


@pytest.fixture
def moe(sound: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny Qwen2-MoE (three experts a layer, one tensor an expert and matrix), to be broken."""
    return copy_of(sound("qwen2_moe"), tmp_path / "moe")


@pytest.fixture
def gpt_oss(sound: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny gpt-oss (expert stacks stored [experts, in, out]), to be broken."""
    return copy_of(sound("gpt_oss"), tmp_path / "gpt_oss")


# -- conversions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 8 MiB; not to be changed."""
    root = tmp_path_factory.mktemp("large")
    source = write_checkpoint(root / "source", tensors_of_size(SHARDS, 1456), SHARDS, CONFIG)
    (source / "tokenizer.json").write_text("{}")
    return source


@pytest.fixture(scope="session")
def finished(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed conversion of `large` gives."""
    dst = tmp_path_factory.mktemp("finished") / "out"
    octavo.convert(large, dst)
    return dst


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three shards of some 40 KiB, to be broken."""
    return write_checkpoint(tmp_path / "small", tensors_of_size(3, 96), 3, CONFIG)


@pytest.fixture(scope="session")
def conversions() -> Iterator[Conversions]:
    made = Conversions()
    yield made
    made.close()


@pytest.fixture(scope="session")
def writes(large: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an undisturbed conversion of `large` with `SLOWLY` writes to its shards."""
    calls, original = 0, os.pwrite

    def counting(*args: Any) -> int:
        nonlocal calls
        calls += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", counting)
        octavo.convert(large, tmp_path_factory.mktemp("counted") / "out", **SLOWLY)
    assert calls > 10 * SHARDS
    return calls
