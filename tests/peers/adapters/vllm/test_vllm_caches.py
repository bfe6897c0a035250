"""KV caches in FP8: with the scales that a checkpoint brings for them, or with 1, as stock has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.coded_models import by_modelopt
from helpers.folders import edit_tensors
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, digest, octavo_job, run
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]

IN_FP8 = {"kv_cache_dtype": "fp8"}
LAYERS = 2
BY_MODELOPT, BY_COMPRESSED_TENSORS = "self_attn.{k}_proj.{k}_scale", "self_attn.{k}_scale"


def value(layer: int, k: str, seed: int = 0) -> Tensor:
    """The scale of the cache of keys, or of values, of a layer."""
    return torch.tensor([0.25 * (layer + 1) + {"k": 0, "v": 1}[k] + seed])


def with_scales(folder: Path, name: str = BY_COMPRESSED_TENSORS, seed: int = 0) -> Path:
    """Add scales of caches to a checkpoint."""

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in range(LAYERS):
            for k in "kv":
                tensors[f"model.layers.{layer}.{name.format(k=k)}"] = value(layer, k, seed)

    return edit_tensors(folder, add)


def declare(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def modelopt(plain: Path, folder: Path) -> Path:
    """As NVIDIA publishes them."""
    source = with_scales(by_modelopt(plain, folder), BY_MODELOPT)
    declare(source / "hf_quant_config.json", lambda told: told["quantization"].update(kv_cache_quant_algo="FP8"))
    return source


def compressed_tensors(plain: Path, folder: Path, strategy: str = "tensor") -> Path:
    """As llm-compressor writes them."""
    source = with_scales(shutil.copytree(convert(plain, "fp8_channel"), folder))
    scheme = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    declare(source / "config.json", lambda told: told["quantization_config"].update(kv_cache_scheme=scheme))
    return source


def scales(answer: Answer) -> list[str]:
    """Those that the layers of attention have, of keys and values, in whatever shape."""
    names = (f"model.layers.{layer}.self_attn.attn._{k}_scale" for layer in range(LAYERS) for k in "kv")
    return [answer.parameters[0][name].split()[-1] for name in names]


WANTED = [digest(value(layer, k)).split()[-1] for layer in range(LAYERS) for k in "kv"]


@pytest.mark.usefixtures("vllm_engine")
def test_tokens_are_those_of_the_converted_checkpoint(tmp_path: Path) -> None:
    plain = make("llama", tmp_path / "plain")
    scaled = with_scales(shutil.copytree(plain, tmp_path / "scaled"))
    jobs = [
        job
        for source in (plain, scaled)
        for job in (octavo_job(source, **IN_FP8), Job(convert(source, "fp8_channel"), IN_FP8))
    ]
    answers = run(*jobs)
    for answer in answers:
        if "does not support" in answer.error or "not supported" in answer.error:
            pytest.skip(f"no cache in FP8 on this processor: {answer.error}")
        assert not answer.error, answer.error
    for mine, stock in zip(answers[::2], answers[1::2], strict=True):
        assert mine.tokens == stock.tokens
        assert mine.logprobs == stock.logprobs
        assert mine.parameters == stock.parameters
    assert scales(answers[2]) == WANTED
    assert answers[0].logprobs != answers[2].logprobs


def test_scales_come_again_with_new_weights(tmp_path: Path) -> None:
    old, new = (with_scales(make("llama", tmp_path / f"{seed}", seed=seed), seed=seed) for seed in (0, 1))
    mine, fresh = load(octavo_job(old, steps=[["reload", str(new)]], **IN_FP8), octavo_job(new, **IN_FP8))
    for answer in (mine, fresh):
        assert not answer.error, answer.error
    assert scales(mine) == WANTED != scales(fresh)
    assert mine.results == [[fresh.parameters[0], True]]


def test_scales_beside_weights_that_are_quantized_already_are_loaded_where_the_cache_is_in_fp8(tmp_path: Path) -> None:
    """Also where vLLM makes it so by what the checkpoint declares."""
    plain = make("llama", tmp_path / "plain")
    nvidia, red_hat = modelopt(plain, tmp_path / "modelopt"), compressed_tensors(plain, tmp_path / "ct")
    answers = load(
        octavo_job(nvidia),
        octavo_job(nvidia, **IN_FP8),
        octavo_job(red_hat, **IN_FP8),
        Job(red_hat, IN_FP8),
        timeout=500,
    )
    for answer in answers:
        assert not answer.error, answer.error
        assert scales(answer) == WANTED
    assert answers[2].parameters == answers[3].parameters
    (unused,) = load(octavo_job(red_hat))
    assert not unused.error, unused.error
    assert set(scales(unused)) == {digest(torch.ones(1)).split()[-1]}
    assert "has scales of a KV cache in FP8 (4 tensors" in unused.output


def test_scales_for_each_head_are_refused_by_name(tmp_path: Path) -> None:
    source = compressed_tensors(make("llama", tmp_path / "plain"), tmp_path / "ct", "attn_head")
    name = "model.layers.0.self_attn.k_scale"
    edit_tensors(source, lambda tensors: tensors.update({name: torch.rand(4, 1, 1) + 1}))
    (answer,) = load(octavo_job(source, **IN_FP8))
    assert f"does not take the tensor '{name}'" in answer.error
