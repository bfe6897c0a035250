"""Layers that vLLM can't make in FP8: they stay as they are, and the others become FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.models import random_model
from helpers.vllm_checkpoints import CONFIGS, make
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_loads")]


def narrow(name: str, folder: Path, **sides: Any) -> Path:
    """One of the checkpoints, with other sides."""
    kind, config = CONFIGS[name]
    random_model(kind, {**config, **sides}).save_pretrained(folder)
    return folder


def in_fp8(parameters: dict[str, str]) -> set[str]:
    return {name for name, digest in parameters.items() if "float8_e4m3fn" in digest}


def test_what_does_not_fit_blocks_stays_and_the_rest_becomes_fp8(tmp_path: Path) -> None:
    dense = make("smollm2", tmp_path / "dense")
    moe = narrow("qwen2_moe", tmp_path / "moe", moe_intermediate_size=192)
    answers = load(*(job for source in (dense, moe) for job in (octavo_job(source, "fp8_block"), Job(source))))
    found = []
    for mine, bf16 in zip(answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.error
        found.append(in_fp8(mine.parameters[0]))
        others = {name for name in bf16.parameters[0] if name.endswith("weight")} - found[-1]
        assert all(mine.parameters[0][name] == bf16.parameters[0][name] for name in others)
    # 576 columns fit: only rows that are fused with others have to be whole blocks
    layers = ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert found[0] == {f"model.layers.{number}.{layer}.weight" for number in (0, 1) for layer in layers}
    # of experts, both matrices
    experts = ("mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj")
    assert found[1] == {
        f"model.layers.{n}.{layer}.weight" for n in (0, 1) for layer in (*experts, "self_attn.qkv_proj", layers[0])
    }
    for why in (
        "6 vLLM can't make this layer in fp8_block: ValueError: Weight output_partition_size = 576 is not divisible",
        "24 vLLM can't make this layer in fp8_block: ValueError: The output_size of gate's and up's weight = 192",
    ):
        assert why in answers[0].output


def test_strict_refuses_by_name(tmp_path: Path) -> None:
    source = make("smollm2", tmp_path / "bf16")
    extra = {"scheme": "fp8_block", "strict": True}
    ignoring = {**extra, "ignore": ["*.q_proj", "*.k_proj", "*.v_proj"]}
    refused, accepted = load(*(octavo_job(source, model_loader_extra_config=each) for each in (extra, ignoring)))
    assert "k_proj.weight can't become FP8 in LlamaForCausalLM: vLLM can't make this layer" in refused.error
    assert "(6 tensors in all)" in refused.error
    assert not accepted.error
