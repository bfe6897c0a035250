"""What vLLM does around a model, with octavo's: as with the converted checkpoint in stock vLLM, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.models import add_tokenizer
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]


def adapter(folder: Path) -> Path:
    """A LoRA adapter of q_proj and down_proj, large enough to change tokens."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tensors = {}
    for number in (0, 1):
        for module, rows, cols in (("self_attn.q_proj", 128, 128), ("mlp.down_proj", 128, 256)):
            name = f"base_model.model.model.layers.{number}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, cols).bfloat16()
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 8).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def both(jobs: list[Job]) -> tuple[Answer, Answer]:
    mine, stock = run(*jobs, timeout=600)
    for answer in (mine, stock):
        assert not answer.error, answer.output[-4000:]
    assert (mine.tokens, mine.logprobs, mine.results) == (stock.tokens, stock.logprobs, stock.results)
    return mine, stock


def jobs_of(source: Path, steps: list[list[str]], **options: object) -> list[Job]:
    return [octavo_job(source, steps=steps, **options), Job(convert(source, "fp8_channel"), options, steps)]


def test_adapters_and_cached_prefixes(tmp_path: Path) -> None:
    steps = [["twice"], ["adapted", str(adapter(tmp_path / "adapter"))]]
    options = {"enable_lora": True, "max_lora_rank": 8, "enable_prefix_caching": True, "block_size": 32}
    mine, _ = both(jobs_of(make("llama", tmp_path / "bf16"), steps, **options))
    (first, second), adapted = mine.results
    assert first == [second[0], 0]
    assert second[1] == 32
    assert adapted != mine.tokens


def test_an_engine_that_pools_gives_the_same_vectors(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    add_tokenizer(source, 260)  # an engine that pools asks for it
    jobs = jobs_of(source, [["pooled"]], runner="pooling", skip_tokenizer_init=False)
    mine, _ = both([dataclasses.replace(job, loaded=True) for job in jobs])
    ((first, second),) = mine.results
    assert len(first) == len(second) == 128
    assert first != second
