"""Fixtures of the fault tests: sound tiny models to break, and a guard against reading weights."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import copy_of


@pytest.fixture
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights, by `os.preadv` as the ring does, fails in a way that is no `OctavoError`."""

    def refuse(*_: Any) -> int:
        raise AssertionError("a weight byte was read")

    monkeypatch.setattr(os, "preadv", refuse)


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """After every fault, all of octavo's threads have ended and all of its files are closed."""
    before = _open_safetensors()
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("octavo")] == []
    assert _open_safetensors() == before


def _open_safetensors() -> list[str]:
    found = []
    for link in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        try:
            target = os.readlink(f"/proc/self/fd/{link}")
        except OSError:
            continue
        if ".safetensors" in target:
            found.append(target)
    return sorted(found)


def _make(folder: Path, config_class: str, **options: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**sizes, **heads, **options})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
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
