"""What recipes choose in models of transformers, and what the report of a load says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _models import (
    ARCHITECTURES,
    SCHEMES,
    Checkpoints,
    by_architecture,
    distinct_bytes,
    is_transposed,
    logits,
    relative_error,
    stacks_of,
)
from transformers import AutoModelForCausalLM

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.models import differences, state_of
from octavo.numerics import schemes
from octavo.running.modules import QuantizedLinear, quantized_weights, scale_name

# -- recipes ----------------------------------------------------------------------------------------------------------


def test_ignore_keeps_what_it_names(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("qwen2_moe")
    model = octavo.load(folder, ignore=["*.self_attn.*", "model.layers.0.mlp.experts"])
    names = {name for name, *_ in quantized_weights(model)}
    assert names
    assert not any(".self_attn." in name for name in names)
    assert not any(name.startswith("model.layers.0.mlp.experts") for name in names)
    assert "model.layers.1.mlp.experts.down_proj" in names
    assert "ignored by '*.self_attn.*'" in model.load_report.kept
    unquantized = state_of(checkpoints.load("qwen2_moe", None))
    for name, tensor in state_of(model).items():
        if tensor.dtype == torch.bfloat16:
            assert same_bytes(tensor, unquantized[name]), name
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("kept", ["gate_up_proj", "down_proj"])
def test_half_of_an_experts_module_may_stay(checkpoints: Checkpoints, architecture: str, kept: str) -> None:
    # in fp32, where both routes differ by rounding only
    folder = checkpoints.folder(architecture)
    model = octavo.load(folder, ignore=[f"*.experts.{kept}"], dtype=torch.float32)
    names = {name.rpartition(".")[-1] for name, *_ in stacks_of(model)}
    assert names == {"gate_up_proj", "down_proj"} - {kept}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state, reference_state = state_of(model), dict(reference.named_parameters())
    with torch.no_grad():
        for name, scheme, parts in quantized_weights(model):
            weight = schemes.dequantize(state[name], state[scale_name(name)], scheme, parts)
            reference_state[name].copy_(weight.transpose(-1, -2) if is_transposed(model, name) else weight)
    assert relative_error(logits(model), logits(reference)) < 1e-5


def test_targets_choose_schemes(checkpoints: Checkpoints, tmp_path: Path) -> None:
    recipe = octavo.Recipe(
        "fp8_channel",
        targets={"re:.*experts.*": "fp8_block", "model.layers.0.self_attn.q_proj": "mxfp8"},
        ignore=["*.o_proj"],
    )
    model = octavo.load(checkpoints.folder("qwen2_moe"), recipe)
    chosen = {name: scheme for name, scheme, _ in quantized_weights(model)}
    assert chosen["model.layers.0.self_attn.q_proj.weight"] == "mxfp8"
    assert chosen["model.layers.1.self_attn.q_proj.weight"] == "fp8_channel"
    assert chosen["model.layers.1.mlp.experts.gate_up_proj"] == "fp8_block"
    assert "model.layers.1.self_attn.o_proj.weight" not in chosen
    model.save_pretrained(tmp_path)
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path)) == []


def test_recipe_without_a_scheme_quantizes_targets_only(checkpoints: Checkpoints) -> None:
    model = octavo.load(checkpoints.folder("qwen2_moe"), octavo.Recipe(None, {"*.experts.*": "fp8_tensor"}))
    assert {(name.split(".")[-1], scheme) for name, scheme, _ in quantized_weights(model)} == {
        ("gate_up_proj", "fp8_tensor"),
        ("down_proj", "fp8_tensor"),
    }


def test_target_that_spells_out_a_name_overrides_what_stays_by_default(checkpoints: Checkpoints) -> None:
    model = octavo.load(checkpoints.folder("llama"), octavo.Recipe(None, {"lm_head": "fp8_channel"}))
    assert isinstance(model.lm_head, QuantizedLinear)
    assert logits(model).isfinite().all()


# -- the report -------------------------------------------------------------------------------------------------------


@by_architecture
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_report_counts_the_bytes_of_the_model(checkpoints: Checkpoints, architecture: str, scheme: str | None) -> None:
    model = checkpoints.load(architecture, scheme)
    report = model.load_report
    assert report.final_bytes == distinct_bytes(state_of(model).values())
    assert report.source_bytes == sum(t.nbytes for t in tensors_of(checkpoints.folder(architecture)).values())
    assert report.read_bytes >= report.source_bytes
    assert report.peak_bytes == report.final_bytes + report.staging_bytes
    counted = sum(count for count, _ in (*report.quantized.values(), *report.kept.values()))
    assert counted == len({id(p) for p in model.parameters()}) - len(list(quantized_weights(model))) + sum(
        name in dict(model.named_buffers()) for name in model.state_dict()
    )
    assert report.unused == {}
    assert set(report.quantized) <= {scheme}
    placed = [sample.placed_bytes for sample in report.trace]
    assert placed == sorted(placed)
    assert set(report.seconds) >= {"open", "skeleton", "plan", "swap", "allocate", "stream", "finish"}
    assert all(seconds >= 0 for seconds in report.seconds.values())


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((name, None) for name in ARCHITECTURES if name != "deepseek_v3"),
        pytest.param("deepseek_v3", None),  # keeps a router bias in fp32
        pytest.param("qwen2_moe", torch.float32),
    ],
)
def test_trace_ends_with_every_byte_in_place(
    checkpoints: Checkpoints, architecture: str, dtype: torch.dtype | None
) -> None:
    report = checkpoints.load(architecture, "fp8_block", dtype).load_report
    planned = sum(size for _, size in (*report.quantized.values(), *report.kept.values()))
    assert report.trace[-1].placed_bytes == planned


def test_report_names_why_weights_stay(checkpoints: Checkpoints) -> None:
    reasons = set(checkpoints.load("qwen2_moe", "fp8_channel").load_report.kept)
    for what in ("MoE router", "embedding", "norm", "output head", "shared expert's gate"):
        assert any(what in reason for reason in reasons), (what, reasons)


def test_report_can_be_printed_and_turned_into_json(checkpoints: Checkpoints) -> None:
    import json

    report = checkpoints.load("qwen2_moe", "fp8_channel").load_report
    assert json.loads(json.dumps(report.to_dict()))["final_bytes"] == report.final_bytes
    assert "kept: norm" in str(report)


@by_architecture
def test_plan_forecasts_what_load_reports(checkpoints: Checkpoints, architecture: str) -> None:
    plan = octavo.plan(checkpoints.folder(architecture), "fp8_block")
    report = checkpoints.load(architecture, "fp8_block").load_report
    assert plan.final_bytes() == report.final_bytes
    assert plan.source_bytes == report.source_bytes
    assert plan.peak_bytes() >= report.peak_bytes
    assert {p.name for p in plan.quantized} == {
        n for n, *_ in quantized_weights(checkpoints.load(architecture, "fp8_block"))
    }


def test_progress_is_told_up_to_the_end(checkpoints: Checkpoints) -> None:
    told: list[tuple[int, int]] = []
    model = octavo.load(checkpoints.folder("qwen2_moe"), progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (model.load_report.read_bytes,) * 2
    assert told == sorted(told)
