"""`octavo plan`: what it shows and prints as JSON, and the exit code that means no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _cli import Run, only_json, refused

import octavo
from octavo.numerics import schemes


def test_plan_shows_what_becomes_of_the_weights_and_why(llama: Path, run: Run) -> None:
    ended = run("plan", llama)
    assert (ended.code, ended.err) == (0, "")
    for part in ("model.layers.*.self_attn.q_proj.weight", "fp8_channel", "embedding", "peak at most"):
        assert part in ended.out


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("scheme", [*schemes.SCHEMES, "none"])
def test_plan_as_json_is_the_plan(scheme: str, model: bool, llama: Path, run: Run) -> None:
    flags = [] if model else ["--checkpoint"]
    found = only_json(run("plan", llama, "--scheme", scheme, "--json", *flags))
    wanted = octavo.plan(llama, None if scheme == "none" else scheme, model=model).to_dict()
    assert found == json.loads(json.dumps(wanted))


def test_plan_honours_ignore_and_staging(llama: Path, run: Run) -> None:
    found = only_json(
        run("plan", llama, "--json", "-i", "*.self_attn.*", "--ignore", "re:.*mlp.*", "--staging", "8MiB")
    )
    assert {tensor["scheme"] for tensor in found["tensors"]} == {None}
    assert found["staging_bytes"] == 8 << 20


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_says_that_it_fits(as_json: bool, llama: Path, run: Run) -> None:
    ended = run("plan", llama, "--device-memory", "24GiB", *(["--json"] if as_json else []))
    assert ended.code == 0
    if as_json:
        found = only_json(ended)
        assert found["fits"] is True
        assert found["device_memory_bytes"] == 24 << 30
    else:
        assert " fits into 24.00 GiB" in ended.out


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_exits_1_when_it_does_not_fit(as_json: bool, llama: Path, run: Run) -> None:
    ended = run("plan", llama, "--device-memory", "1MiB", *(["--json"] if as_json else []))
    if as_json:
        assert only_json(ended)["fits"] is False
    else:
        assert " does not fit into 1.00 MiB" in ended.out
    assert ended.err == ""
    assert ended.code == 1


def test_plan_fits_exactly_at_its_own_peak(llama: Path, run: Run) -> None:
    peak = octavo.plan(llama).peak_bytes()
    assert only_json(run("plan", llama, "--json", "--device-memory", peak))["fits"] is True
    assert only_json(run("plan", llama, "--json", "--device-memory", peak - 1))["fits"] is False


def test_a_conversion_fits_where_its_model_does_not(llama: Path, run: Run) -> None:
    whole, staging = octavo.plan(llama, model=False).final_bytes(), 1 << 20
    options = ("--json", "--device-memory", max(whole, staging), "--staging", staging)
    assert only_json(run("plan", llama, *options))["fits"] is False
    assert only_json(run("plan", llama, *options, "--checkpoint"))["fits"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to ask")
def test_plan_for_the_device_s_own_memory_needs_a_device(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--device-memory", "auto"), "needs a GPU here")


def test_plan_for_a_device_that_is_not_here_works(llama: Path, run: Run) -> None:
    found = only_json(run("plan", llama, "--json", "--checkpoint", "--device", "cuda:3"))
    assert set(found["devices"]) == {"cuda:3"}


def test_a_format_is_for_planning_a_conversion(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--format", "fp8"), "--format is for planning a conversion: add --checkpoint")


def test_plan_names_a_pattern_that_matches_nothing(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--ignore", "model.layers.7"), "'model.layers.7' matches no tensor")
