"""Loading alone, with whatever vLLM is installed: also the oldest supported, whose kernels need another torch.

make peers-vllm VLLM=0.24.0
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.folders import edit_tensors, tensors_of
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load

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


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_tensor_that_comes_twice_is_not_taken_for_another(goes_on: bool, tmp_path: Path) -> None:
    gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    rest = [[up]] if goes_on else []
    old, after, new, errors = update("llama", "fp8_channel", lambda _: [[gate], [gate], *rest], tmp_path)
    assert f"{gate}: came twice in one update" in errors[0]
    if goes_on:  # then the layer is complete
        assert after == {key: (new if "layers.1.mlp.gate_up_proj." in key else old)[key] for key in new} != old
        assert len(errors) == 1
    else:
        assert after == old
        assert f"{gate} came, {up} did not" in errors[1]


def test_layers_that_an_update_does_not_bring_stay(tmp_path: Path) -> None:
    def calls(names: list[str]) -> list[list[str]]:
        return [[name for name in names if name.startswith("model.layers.1.")]]

    old, after, new, errors = update("llama", "fp8_channel", calls, tmp_path)
    assert errors == []
    assert after == {key: (new if key.startswith("model.layers.1.") else old)[key] for key in new} != old


def test_stacks_of_experts_stay_where_the_loader_takes_no_scales(tmp_path: Path) -> None:
    (answer,) = load(octavo_job(make("granitemoe", tmp_path / "bf16")))
    assert not answer.error, answer.error
    experts = [digest for name, digest in answer.parameters[0].items() if ".experts." in name and "_weight" in name]
    assert len(experts) == 4
    assert all("bfloat16" in digest for digest in experts)


def test_half_a_layer_is_named(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "bf16")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    (answer,) = load(octavo_job(folder))
    assert "(only model.layers.1.mlp.gate_proj.weight goes there)" in answer.error
    assert not answer.parameters
