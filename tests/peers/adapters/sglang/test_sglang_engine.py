"""SGLang's whole engine on a CPU: what it answers through octavo is what it answers with octavo's conversion."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from helpers import random_weights, write_checkpoint
from helpers.folders import tensors_of
from helpers.sglang_checkpoints import convert, make
from helpers.sglang_engine import run
from helpers.sglang_loading import Job, octavo_job

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads", "stand_ins_fit"),
]


@pytest.fixture
def stand_ins_fit() -> None:
    if not importlib.metadata.version("sglang").startswith("0.5.15"):
        pytest.skip("the stand-ins for kernels are those of SGLang 0.5.15's engine")


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_tokens_and_logprobs_are_those_of_the_conversion(scheme: str, tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "bf16")
    mine, stock = run(octavo_job(source, scheme)), run(Job(convert(source, scheme)))
    for answer in (mine, stock):
        assert not answer.error, answer.output[-4000:]
        assert [len(tokens) for tokens in answer.tokens] == [8, 8]
    assert (mine.tokens, mine.logprobs) == (stock.tokens, stock.logprobs)


def test_a_second_start_uses_the_plan_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    job = octavo_job(make("qwen3_moe", tmp_path / "bf16"), log_level="info")
    first, second = run(job), run(job)
    for answer, count in ((first, 0), (second, 1)):
        assert not answer.error, answer.output[-4000:]
        assert answer.output.count("octavo: plan remembered from an earlier start") == count
    assert (first.tokens, first.logprobs) == (second.tokens, second.logprobs)


def adapter_of(source: Path, folder: Path) -> Path:
    """One for LoRA, of all of a Llama's matrices, as PEFT saves it."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = {}
    for seed, (name, weight) in enumerate(tensors_of(source).items()):
        if name.endswith("_proj.weight"):
            base, (rows, cols) = f"base_model.model.{name.removesuffix('.weight')}", weight.shape
            tensors[f"{base}.lora_A.weight"] = random_weights((8, cols), torch.bfloat16, seed)
            tensors[f"{base}.lora_B.weight"] = random_weights((rows, 8), torch.bfloat16, seed + 1000)
    write_checkpoint(folder, tensors).joinpath("model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_of_lora_changes_what_it_changes_of_the_conversion(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    lora = adapter_of(source, tmp_path / "lora")
    mine, stock = run(octavo_job(source), lora=lora), run(Job(convert(source, "fp8_channel")), lora=lora)
    bare = run(octavo_job(source))
    for answer in (mine, stock, bare):
        assert not answer.error, answer.output[-4000:]
    assert (mine.tokens, mine.logprobs) == (stock.tokens, stock.logprobs)
    assert mine.logprobs[0] != bare.logprobs[0]
    assert mine.logprobs[1] == bare.logprobs[1]
