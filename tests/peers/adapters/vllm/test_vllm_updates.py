"""Updates, without the engine: what trainers may send that is not what the checkpoint was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.folders import edit_tensors, tensors_of
from helpers.models import random_model
from helpers.vllm_checkpoints import CONFIGS
from helpers.vllm_engine import octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


def two(name: str, folder: Path, **sides: Any) -> tuple[Path, Path]:
    """Two checkpoints of one model, old and new."""
    kind, config = CONFIGS[name]
    for number, which in enumerate(("old", "new")):
        random_model(kind, {**config, **sides}, seed=number).save_pretrained(folder / which)
    return folder / "old", folder / "new"


@pytest.mark.parametrize("intermediate", [128, 48], ids=["packed", "padded"])
def test_experts_that_stay_in_bf16_are_packed_again(intermediate: int, tmp_path: Path) -> None:
    """vLLM alone packs them for a CPU the first time only, and reads what came next as if it were packed."""
    old, new = two("qwen3_moe", tmp_path, moe_intermediate_size=intermediate)
    names = list(tensors_of(new))
    steps = [["update", str(new), [names]], ["reload", str(old)], ["update", str(new), [names[::2], names[1::2]]]]
    extra = {"ignore": ["*.mlp.experts.*"]}
    mine, fresh = load(
        octavo_job(old, steps=steps, model_loader_extra_config=extra), octavo_job(new, model_loader_extra_config=extra)
    )
    assert not mine.error, mine.error
    assert any(".experts." in name and "bfloat16" in digest for name, digest in fresh.parameters[0].items())
    assert mine.results == [
        [fresh.parameters[0], True, []],
        [mine.parameters[0], True],
        [fresh.parameters[0], True, []],
    ]


GATE_UP, EMBEDDING = "model.layers.0.mlp.gate_up_proj.weight", "model.embed_tokens.weight"
STACK = "model.layers.0.mlp.experts"
#: names that are sent -> the tensors under them, and what the error says
Sent = dict[str, Callable[[dict[str, Tensor]], Tensor]]


def fused(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])


def stack(tensors: dict[str, Tensor]) -> Tensor:
    parts = [[tensors[f"{STACK}.{n}.{part}_proj.weight"] for part in ("gate", "up")] for n in range(4)]
    return torch.stack([torch.cat(each) for each in parts])


def nan(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[EMBEDDING].index_fill(0, torch.tensor([7]), torch.nan)


WRONG: dict[str, dict[str, tuple[Sent, str]]] = {
    "llama": {
        "turned": (
            {GATE_UP: lambda t: fused(t).T.contiguous()},
            f"{GATE_UP}: has the shape [128, 512], and LlamaForCausalLM takes it as [512, 128]",
        ),
        "short": (
            {GATE_UP: lambda t: fused(t)[:-2].clone()},
            f"{GATE_UP}: has the shape [510, 128], and LlamaForCausalLM takes it as [512, 128]",
        ),
        "long": (
            {GATE_UP: lambda t: torch.cat([fused(t), fused(t)[:2]])},
            f"{GATE_UP}: has the shape [514, 128], and LlamaForCausalLM takes it as [512, 128]",
        ),
        "a wrapper's": (
            {f"base_model.{EMBEDDING}": lambda t: t[EMBEDDING].clone()},
            f"base_model.{EMBEDDING}: is no tensor of the checkpoint, and LlamaForCausalLM does not take it",
        ),
        "not a number": ({EMBEDDING: nan}, f"{EMBEDDING}: holds a number that is not finite"),
    },
    "qwen3_moe": {
        "turned": (
            {f"{STACK}.gate_up_proj": lambda t: stack(t).transpose(1, 2).contiguous()},
            f"{STACK}.gate_up_proj: has the shape [4, 128, 256], and Qwen3MoeForCausalLM takes it as [4, 256, 128]",
        ),
        "vllm's own": (
            {f"{STACK}.w13_weight": stack},
            f"{STACK}.w13_weight: vLLM's loader knows no such tensor, and {STACK}.0.down_proj.weight did not come",
        ),
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cant_be_loaded_is_refused_by_its_name_and_shape(name: str, tmp_path: Path) -> None:
    """vLLM drops some of it without a word, and its loaders assert the rest, without one."""
    old, new = two(name, tmp_path)
    tensors, steps = tensors_of(new), []
    for number, (sent, _) in enumerate(WRONG[name].values()):
        folder = tmp_path / str(number)
        shutil.copytree(new, folder)
        edit_tensors(folder, lambda found, sent=sent: found.update({n: make(tensors) for n, make in sent.items()}))
        steps.append(["update", str(folder), [list(sent)]])
    mine, fresh = load(octavo_job(old, steps=[*steps, ["reload", str(new)]]), octavo_job(new))
    assert not mine.error, mine.error
    *results, reloaded = mine.results
    for (sent, says), (after, _, errors) in zip(WRONG[name].values(), results, strict=True):
        assert any(says in error for error in errors), errors
        if EMBEDDING not in sent:
            assert after == mine.parameters[0]
        mine.parameters[0] = after
    assert reloaded == [fresh.parameters[0], True]


def test_an_expert_too_many_in_a_stack_is_no_other_rank_s(tmp_path: Path) -> None:
    """By another name than the checkpoint's: of four experts, each rank has two, and passes over the others."""
    old, new = two("qwen3_moe", tmp_path)
    name, folders = f"{STACK}.gate_up_proj", [shutil.copytree(new, tmp_path / which) for which in ("wide", "right")]
    for folder, more in zip(folders, (1, 0), strict=True):
        edit_tensors(folder, lambda found, n=more: found.update({name: torch.cat([stack(found), stack(found)[:n]])}))
    parts = {f"{STACK}.{n}.{part}_proj.weight" for n in range(4) for part in ("gate", "up")}
    names = [sent for sent in tensors_of(folders[0]) if sent not in parts]
    steps = [["update", str(folder), [names]] for folder in folders]
    one = {"tensor_parallel_size": 1, "rank": 0, "enable_expert_parallel": False}
    ranks = [one, *({"tensor_parallel_size": 2, "rank": n, "enable_expert_parallel": True} for n in range(2))]
    mine = load(*(octavo_job(old, steps=steps, **options) for options in ranks))
    fresh = load(*(octavo_job(new, **options) for options in ranks))
    for answer, wanted in zip(mine, fresh, strict=True):
        assert not answer.error, answer.error
        (*_, errors), right = answer.results
        assert f"{name}: has the shape [5, 256, 128], and Qwen3MoeForCausalLM takes it as [4, 256, 128]" in errors[0]
        assert right == [wanted.parameters[0], True, []]


def test_buffers_that_trainers_send_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    old, new = two("llama", tmp_path)
    frequencies = [f"model.layers.{number}.self_attn.rotary_emb.inv_freq" for number in range(2)]
    names = list(tensors_of(new))
    edit_tensors(new, lambda tensors: tensors.update({name: torch.rand(16) for name in frequencies}))
    step = ["update", str(new), [[*names, *frequencies]]]
    mine, fresh = load(octavo_job(old, steps=[step, step]), octavo_job(new))
    assert mine.results == [[fresh.parameters[0], True, []]] * 2, mine.error
    assert mine.output.count("octavo: an update brought what vLLM's loader passes over: 2 tensors (model.lay") == 1
