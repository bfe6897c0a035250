"""Layers that vLLM can't make in FP8: they stay as they are, and the others become FP8."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.folders import edit_tensors
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


def test_experts_of_which_a_rank_has_no_whole_blocks_stay_and_are_warned_of(tmp_path: Path) -> None:
    """As those of Qwen1.5-MoE on two ranks, which have 704 of 1,408 rows. Of these, a rank has 64 of 128."""
    source = make("qwen2_moe", tmp_path / "bf16")
    (mine,) = load(octavo_job(source, "fp8_block", tensor_parallel_size=2, rank=1))
    assert not mine.error, mine.error
    assert in_fp8(mine.parameters[0])
    assert not any("experts.w" in name for name in in_fp8(mine.parameters[0]))
    said = r"WARNING.*octavo: .* stays unquantized \(.*can't make this layer in fp8_block: .* 64 is not divisible"
    assert re.search(said, mine.output)


def test_strict_refuses_by_name(tmp_path: Path) -> None:
    source = make("smollm2", tmp_path / "bf16")
    extra = {"scheme": "fp8_block", "strict": True}
    ignoring = {**extra, "ignore": ["*.q_proj", "*.k_proj", "*.v_proj"]}
    refused, accepted = load(*(octavo_job(source, model_loader_extra_config=each) for each in (extra, ignoring)))
    assert "k_proj.weight can't become FP8 in LlamaForCausalLM: vLLM can't make this layer" in refused.error
    assert "(6 tensors in all)" in refused.error
    assert not accepted.error


def test_experts_for_which_a_cpu_has_no_kernel_stay(tmp_path: Path) -> None:
    """Gemma-4's are gated by tanh's GELU, and vLLM said so when all of them had been loaded."""
    source = make("gemma4", tmp_path / "bf16")
    strict = octavo_job(source, model_loader_extra_config={"strict": True})
    mine, bf16, refused = load(octavo_job(source), Job(source), strict)
    assert not mine.error, mine.error
    experts = {name for name in bf16.parameters[0] if ".experts." in name}
    assert experts
    assert all(mine.parameters[0][name] == bf16.parameters[0][name] for name in experts)
    assert len(in_fp8(mine.parameters[0])) == 8
    assert "no kernel of cpu takes these experts (gelu_tanh)" in mine.output
    assert "experts.down_proj can't become FP8 in Gemma4ForCausalLM: vLLM can't make this layer" in refused.error


def reward_model(folder: Path) -> Path:
    """A Qwen2 with a head of two layers."""
    kind, config = "Qwen2Config", {**CONFIGS["llama"][1], "num_labels": 1}
    random_model(kind, config).save_pretrained(folder)
    served = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**served, "architectures": ["Qwen2ForRewardModel"]}))

    def add_head(tensors: dict[str, Any]) -> None:
        tensors.pop("lm_head.weight")
        for number, shape in ((0, (128, 128)), (2, (1, 128))):
            tensors[f"score.{number}.weight"] = torch.randn(shape).bfloat16()
            tensors[f"score.{number}.bias"] = torch.randn(shape[0]).bfloat16()

    edit_tensors(folder, add_head)
    return folder


def test_heads_of_rewards_stay_and_dummies_are_in_fp8_as_what_they_stand_for(tmp_path: Path) -> None:
    reward = reward_model(tmp_path / "reward")
    moe = make("qwen2_moe", tmp_path / "moe")
    dummy = {"quantization": "octavo_fp8_channel", "load_format": "dummy"}
    answers = load(*(job for source in (reward, moe) for job in (octavo_job(source), Job(source, dummy))))
    for mine, dummies in zip(answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.error
        assert not dummies.error, dummies.error
        assert in_fp8(dummies.parameters[0]) == in_fp8(mine.parameters[0]) != set()
        assert not any("score" in name for name in in_fp8(mine.parameters[0]))
    assert "score.0.weight" in answers[0].parameters[0]
    assert "--load-format dummy reads no checkpoint: layers are made in fp8_channel" in answers[1].output


def test_a_model_of_which_nothing_becomes_fp8_is_warned_of(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    extra = {"ignore": ["model.layers.*"]}
    (answer,) = load(octavo_job(source, model_loader_extra_config=extra))
    assert not answer.error, answer.error
    assert re.search("WARNING.*octavo: nothing in fp8_channel: all stays unquantized", answer.output)


def ignoring(source: Path, *patterns: str) -> Job:
    return octavo_job(source, model_loader_extra_config={"ignore": [*patterns]})


def test_layers_are_ignored_by_names_of_vllm_too(tmp_path: Path) -> None:
    source = make("qwen2_moe", tmp_path / "bf16")
    mine, by_tensors, part, unknown = load(
        ignoring(source, "*.0.self_attn.qkv_proj", "re:.*1.mlp.experts$", "*.o_proj"),
        ignoring(source, "*.0.self_attn.[qkv]_proj", "*.1.mlp.experts.*", "*.o_proj"),
        ignoring(source, "*.experts.w2_weight"),
        ignoring(source, "model.layers.0.self_attn.qkvproj", "*.o_proj"),
    )
    assert not mine.error, mine.error
    assert mine.parameters == by_tensors.parameters
    assert not any("0.self_attn.qkv" in name or "1.mlp.experts" in name for name in in_fp8(mine.parameters[0]))
    assert "3 ignored by '*.0.self_attn.qkv_proj'" in mine.output
    assert "experts.w2_weight, a part of model.layers.0.mlp.experts, which stays as a whole" in part.error
    assert "'model.layers.0.self_attn.qkvproj' matches no tensor of" in unknown.error
    assert "the nearest tensor is 'model.layers.0.self_attn." in unknown.error
    assert "the nearest layer is 'model.layers.0.self_attn.qkv_proj'" in unknown.error
    # in a line of its own, before the tracebacks of vLLM's processes
    assert "ERROR" in next(line for line in unknown.output.splitlines() if "octavo: ignore: 'model." in line)
