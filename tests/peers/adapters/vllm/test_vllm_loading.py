"""Loading alone, with whatever vLLM is installed: also the oldest supported, whose kernels need another torch.

make peers-vllm VLLM=0.24.0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.folders import edit_tensors, tensors_of
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load
from helpers.vllm_published import as_trainer_sends, qwen2_5_vl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("smollm2", "fp8_channel"),
        ("opt", "fp8_channel"),
        ("llama", "fp8_channel"),
        ("llama", "fp8_block"),
        ("qwen2_moe", "fp8_channel"),
        ("mixtral", "fp8_channel"),
        ("qwen3_moe", "fp8_channel"),
        ("phi3", "fp8_block"),
    ],
)
def test_parameters_equal_those_of_the_converted_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "bf16")
    flag = Job(source, {"quantization": f"octavo_{scheme}"})
    mine, flagged, stock = load(octavo_job(source, scheme), flag, Job(convert(source, scheme)), timeout=500)
    for answer in (mine, flagged, stock):
        assert not answer.error, answer.error
    assert any("float8_e4m3fn" in digest for digest in stock.parameters[0].values())
    assert mine.parameters == flagged.parameters == stock.parameters


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_reloading_equals_a_fresh_load_in_the_same_memory(scheme: str, tmp_path: Path) -> None:
    old, new = make("llama", tmp_path / "old"), make("llama", tmp_path / "new", seed=1)
    steps = [["reload", str(new)], ["reload", str(old)]]
    mine, fresh = load(octavo_job(old, scheme, steps), octavo_job(new, scheme))
    assert not mine.error, mine.error
    assert mine.parameters != fresh.parameters
    assert mine.results == [[fresh.parameters[0], True], [mine.parameters[0], True]]


def test_views_of_weights_that_are_packed_are_new_after_a_reload(tmp_path: Path) -> None:
    """Mamba's ``conv_weights``, which the forward reads; vLLM 0.32 alone leaves it as it was, in bf16 as well."""
    old, new = make("mamba2", tmp_path / "old"), make("mamba2", tmp_path / "new", seed=1)
    steps = [["reload", str(new)], ["update", str(old), [list(tensors_of(old))]], ["reload", str(new)]]
    mine, fresh, stock = load(
        octavo_job(old, steps=steps, packs=True), octavo_job(new), Job(old, steps=[["reload", str(new)]])
    )
    for answer in (mine, fresh, stock):
        assert not answer.error, answer.error
    views = {name for name in mine.parameters[0] if name.endswith(".conv_weights")}
    assert len(views) == 2
    assert all(mine.parameters[0][name] != fresh.parameters[0][name] for name in views)
    assert [result[0] for result in mine.results] == [fresh.parameters[0], mine.parameters[0], fresh.parameters[0]]
    left = {name for name, digest in stock.results[0][0].items() if digest == stock.parameters[0][name]}
    assert left & views in (views, set())  # 0.24 does not; where its kernels pack weights, these are empty and alike


def update(name: str, scheme: str, calls: Callable[[list[str]], list[list[str]]], tmp_path: Path) -> tuple[Any, ...]:
    """An update with another checkpoint's tensors, named by each call: digests before, after, of the other; errors."""
    old, new = make(name, tmp_path / "old"), make(name, tmp_path / "new", seed=1)
    step = ["update", str(new), calls(list(tensors_of(new)))]
    mine, fresh = load(octavo_job(old, scheme, [step, ["reload", str(new)]]), octavo_job(new, scheme))
    assert not mine.error, mine.error
    (after, in_place, errors), reloaded = mine.results
    assert in_place
    assert reloaded == [fresh.parameters[0], True]  # whatever went wrong before
    return mine.parameters[0], after, fresh.parameters[0], errors


@pytest.mark.parametrize(
    ("name", "scheme", "lacking", "stays"),
    [
        ("llama", "fp8_channel", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_up_proj."),
        ("llama", "fp8_block", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.qkv_proj."),
        ("qwen2_moe", "fp8_channel", "model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.experts."),
    ],
)
def test_a_layer_of_which_an_update_brings_a_part_stays_and_is_named(
    name: str, scheme: str, lacking: str, stays: str, tmp_path: Path
) -> None:
    def calls(names: list[str]) -> list[list[str]]:
        names.remove(lacking)
        return [names[::2], names[1::2]]

    old, after, new, errors = update(name, scheme, calls, tmp_path)
    mixed = {key: (old if key.startswith(stays) else new)[key] for key in new}
    assert after == mixed != new
    (error,) = errors
    assert stays.rstrip(".") in error
    assert f"{lacking} did not" in error


GATE, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
FUSED = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("calls", "errors", "new_layers"),
    [
        ([[GATE], [GATE]], [f"{GATE}: came twice in one update"], ()),
        # what had come before a call that failed has gone
        ([[GATE], [GATE], [UP]], ["came twice", f"{UP} came, {GATE} did not"], ()),
        ([[GATE], [GATE], [UP, GATE]], ["came twice"], ("layers.1.mlp.gate_up_proj.",)),
        ([[O_PROJ], [O_PROJ]], [f"{O_PROJ}: came again"], ("layers.0.self_attn.o_proj.",)),
        # by the name of vLLM's own layer
        ([[FUSED]], [], ("layers.1.self_attn.qkv_proj.",)),
        ([[FUSED.replace("qkv", "q")], [FUSED]], [f"{FUSED.replace('qkv', 'q')}: came twice"], ()),
    ],
    ids=["twice", "then the rest", "then all", "again", "fused", "fused and apart"],
)
def test_a_tensor_that_vllm_would_take_for_another_is_refused(
    calls: list[list[str]], errors: list[str], new_layers: tuple[str, ...], tmp_path: Path
) -> None:
    old, after, new, found = update("llama", "fp8_channel", lambda _: calls, tmp_path)
    assert len(found) == len(errors)
    for part, error in zip(errors, found, strict=True):
        assert part in error
    assert after == {key: (new if any(part in key for part in new_layers) else old)[key] for key in new}


def update_by_other_names(old: Path, new: Path, sent: Path) -> None:
    """What is sent has the values of a checkpoint that is loaded afresh; some tensors at a time, again and again."""
    names = list(tensors_of(sent))
    steps = [["update", str(sent), [names]], ["reload", str(old)], ["update", str(sent), [names[::2], names[1::2]]]]
    mine, fresh = load(octavo_job(old, steps=steps), octavo_job(new))
    assert not mine.error, mine.error
    assert not fresh.error, fresh.error
    assert any("float8" in digest for digest in fresh.parameters[0].values())
    assert set(names) != set(tensors_of(new))
    assert mine.results == [
        [fresh.parameters[0], True, []],
        [mine.parameters[0], True],
        [fresh.parameters[0], True, []],
    ]


def test_experts_in_stacks_are_requantized_as_matrices(tmp_path: Path) -> None:
    """As transformers has them since version 5, where the checkpoint has them apart."""
    pytest.importorskip("vllm", "0.32")  # 0.24 does not know these names

    def stack(tensors: dict[str, Any]) -> None:
        for layer in range(2):
            experts = f"model.layers.{layer}.mlp.experts"
            pairs = [[tensors.pop(f"{experts}.{n}.{part}_proj.weight") for part in ("gate", "up")] for n in range(4)]
            tensors[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
            downs = [tensors.pop(f"{experts}.{n}.down_proj.weight") for n in range(4)]
            tensors[f"{experts}.down_proj"] = torch.stack(downs)

    old, new = make("qwen3_moe", tmp_path / "old"), make("qwen3_moe", tmp_path / "new", seed=1)
    update_by_other_names(old, new, edit_tensors(make("qwen3_moe", tmp_path / "sent", seed=1), stack))


def test_names_of_a_trainers_model_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")  # without which vLLM has no vision-language models
    old, new, sent = (qwen2_5_vl(tmp_path / name, seed) for name, seed in (("old", 0), ("new", 1), ("sent", 1)))
    update_by_other_names(old, new, as_trainer_sends(sent))


def test_a_part_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """phi3's checkpoint has them fused; vLLM's loader takes them apart as well."""
    part = FUSED.replace("qkv", "q")
    old, after, _, errors = update("phi3", "fp8_channel", lambda _: [[part]], tmp_path)
    assert f"{part}: is no tensor of the checkpoint" in errors[0]
    assert after == old


def test_an_update_without_biases_leaves_them_or_is_refused(tmp_path: Path) -> None:
    """vLLM 0.32 has them where they are meanwhile; 0.24 does not, and would lose them."""

    def calls(names: list[str]) -> list[list[str]]:
        return [[name for name in names if not name.endswith(".bias")]]

    old, after, new, errors = update("opt", "fp8_channel", calls, tmp_path)
    with_bias = {key.rpartition(".")[0] for key in new if key.endswith(".bias")}
    if errors:
        assert after == {key: (old if key.rpartition(".")[0] in with_bias else new)[key] for key in new}
    else:
        assert after == {key: (old if key.endswith(".bias") else new)[key] for key in new}


def test_biases_alone_are_new_or_refused_and_a_layer_is_never_mixed(tmp_path: Path) -> None:
    q = "model.decoder.layers.0.self_attn.q_proj"

    def alone(names: list[str]) -> list[list[str]]:
        return [[name for name in names if name.endswith(".bias")]]

    def but_a_weight(names: list[str]) -> list[list[str]]:
        return [[name for name in names if name != f"{q}.weight"]]

    old, after, new, errors = update("opt", "fp8_channel", alone, tmp_path / "alone")
    assert after == (old if errors else {key: (new if key.endswith(".bias") else old)[key] for key in new})
    old, after, new, errors = update("opt", "fp8_channel", but_a_weight, tmp_path / "but a weight")
    assert f"{q}.weight did not" in errors[0]
    assert after == {key: (old if ".0.self_attn.qkv_proj." in key else new)[key] for key in new}


def test_what_is_not_finite_or_has_another_shape_is_refused(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Any]) -> None:
        tensors[GATE][3, 5] = math.nan
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    old, new, bad = (make("llama", tmp_path / name, seed=seed) for name, seed in (("old", 0), ("new", 1), ("bad", 1)))
    edit_tensors(bad, spoil)
    names = (GATE, "model.norm.weight", "lm_head.weight")
    steps = [*(["update", str(bad), [[name]]] for name in names), ["reload", str(new)]]
    mine, fresh = load(octavo_job(old, steps=steps), octavo_job(new))
    assert not mine.error, mine.error
    (after, _, (not_finite,)), (again, _, (misshapen,)), (once_more, _, (integers,)), reloaded = mine.results
    assert f"{GATE}: holds a number that is not finite" in not_finite
    assert "model.norm.weight: has the shape [" in misshapen
    assert "lm_head.weight: is torch.int8, was loaded from torch.bfloat16" in integers
    assert after == again == once_more == mine.parameters[0]
    assert reloaded == [fresh.parameters[0], True]


@pytest.mark.parametrize("name", ["opt", "qwen2_moe"])
def test_an_update_that_failed_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    """Begun again without an end, as vLLM allows: by any way."""
    old, new = make(name, tmp_path / "old"), make(name, tmp_path / "new", seed=1)
    names = list(tensors_of(new))
    unended = ["update", str(new), [names[:9], names[:9]], False]  # the second call fails
    whole = ["update", str(new), [names]]
    steps = [unended, whole, unended, ["reload", str(old)], unended, unended, whole]
    mine, fresh = load(octavo_job(old, steps=steps), octavo_job(new))
    assert not mine.error, mine.error
    ends = [mine.results[at] for at in (1, 3, 6)]
    assert [end[0] for end in ends] == [fresh.parameters[0], mine.parameters[0], fresh.parameters[0]]
    assert [end[1] for end in ends] == [True] * 3
    assert ends[0][2] == ends[2][2] == []


def test_what_a_loader_does_not_count_is_named(tmp_path: Path) -> None:
    """vLLM's for gpt-oss copies experts past what counts them: vLLM alone leaves them as they were, without a word."""
    old, new = make("gpt_oss", tmp_path / "old"), make("gpt_oss", tmp_path / "new", seed=1)
    mine, fresh = load(octavo_job(old, steps=[["update", str(new), [list(tensors_of(new))]]]), octavo_job(new))
    assert not mine.error, mine.error
    ((after, in_place, errors),) = mine.results
    assert in_place
    assert ".experts" in errors[-1]
    assert "came, and vLLM's loader put it elsewhere" in errors[-1]
    differ = {name for name, digest in fresh.parameters[0].items() if digest != mine.parameters[0][name]}
    stayed = {name for name in differ if after[name] == mine.parameters[0][name]}
    assert stayed
    assert all(".experts." in name or name.endswith(".sinks") for name in stayed)
    assert all(after[name] == fresh.parameters[0][name] for name in differ - stayed)


def test_layers_that_an_update_does_not_bring_stay(tmp_path: Path) -> None:
    def calls(names: list[str]) -> list[list[str]]:
        return [[name for name in names if name.startswith("model.layers.1.")]]

    old, after, new, errors = update("llama", "fp8_channel", calls, tmp_path)
    assert errors == []
    assert after == {key: (new if key.startswith("model.layers.1.") else old)[key] for key in new} != old


def test_half_a_layer_is_named(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "bf16")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    (answer,) = load(octavo_job(folder))
    assert "only model.layers.1.mlp.gate_proj.weight goes there; " in answer.error
    assert not answer.parameters
