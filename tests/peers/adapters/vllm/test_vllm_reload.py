"""Reloading and weight updates of a running engine: requantized in place, equal to a fresh load, nothing moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.folders import edit_tensors
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import Answer, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]


def assert_state(state: dict[str, Any], fresh: Answer) -> None:
    assert state["parameters"] == fresh.parameters
    assert state["tokens"] == fresh.tokens
    assert state["logprobs"] == fresh.logprobs


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_every_way_of_reloading_equals_a_fresh_load(name: str, scheme: str, tmp_path: Path) -> None:
    old, new = make(name, tmp_path / "old"), make(name, tmp_path / "new", seed=1)
    steps = [
        ["state"],
        ["reload_path", str(new)],
        ["state"],
        ["reload_iterator", str(old)],
        ["state"],
        ["transfer", str(new), 1],
        ["state"],
        ["transfer", str(old), 7],
        ["state"],
        ["bare_load", str(new)],
        ["state"],
    ]
    transfer = {"weight_transfer_config": {"backend": "file"}}
    mine, fresh = run(octavo_job(old, scheme, steps, **transfer), octavo_job(new, scheme), timeout=600)
    assert not mine.error, mine.output[-4000:]
    assert not fresh.error, fresh.output[-4000:]
    assert mine.tokens != fresh.tokens
    states, outcomes = mine.results[::2], mine.results[1::2]
    assert outcomes[:4] == [""] * 4
    for state, expected in zip(states, (mine, fresh, mine, fresh, mine, mine), strict=True):
        assert_state(state, expected)
        assert state["addresses"] == states[0]["addresses"]
    # vLLM alone would load bf16 over what its kernels read, under fp8_block without a word
    assert "into which weights can't be loaded. Use reload_weights" in outcomes[4]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    old, new = make("llama", tmp_path / "old"), make("llama", tmp_path / "new", seed=1)
    edit_tensors(new, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    (mine,) = run(octavo_job(old, steps=[["reload_path", str(new)], ["state"]]))
    refusal, state = mine.results
    assert "has no model.layers.1.mlp.up_proj.weight" in refusal
    assert_state(state, mine)


def test_fifty_reloads_move_nothing_and_leave_nothing_behind(tmp_path: Path) -> None:
    old, new = make("qwen2_moe", tmp_path / "old"), make("qwen2_moe", tmp_path / "new", seed=1)
    steps = [["state"], ["reload_often", [str(new), str(old)], 50], ["state"]]
    mine, fresh = run(octavo_job(old, "fp8_block", steps), octavo_job(new, "fp8_block"), timeout=800)
    assert not mine.error, mine.output[-4000:]
    before, often, after = mine.results
    assert_state(after, mine)
    assert after["addresses"] == before["addresses"]
    for number, (_, tokens) in enumerate(often):
        assert tokens == (fresh, mine)[number % 2].tokens
    # the model has 2 MiB; what the first few leave in allocators is no growth
    resident = [nbytes for nbytes, _ in often]
    assert max(resident[-10:]) - max(resident[5:15]) < 2 << 20


def test_a_transfer_that_brings_half_a_layer_is_refused_and_the_engine_goes_on(tmp_path: Path) -> None:
    old, new = make("llama", tmp_path / "old"), make("llama", tmp_path / "new", seed=1)
    half = make("llama", tmp_path / "half", seed=1)
    edit_tensors(half, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    steps = [["transfer", str(half), 5], ["state"], ["finish"], ["transfer", str(new), 5], ["state"]]
    transfer = {"weight_transfer_config": {"backend": "file"}}
    mine, fresh = run(octavo_job(old, steps=steps, **transfer), octavo_job(new))
    refusal, between, *outcomes, after = mine.results
    assert "model.layers.1.mlp.gate_up_proj: model.layers.1.mlp.gate_proj.weight came, " in refusal
    stayed = {name for name, digest in between["parameters"][0].items() if digest == mine.parameters[0][name]}
    changed = {name for name, digest in fresh.parameters[0].items() if digest != mine.parameters[0][name]}
    assert changed & stayed == {name for name in changed if ".1.mlp.gate_up_proj." in name}
    assert outcomes == ["", ""]
    assert_state(after, fresh)
