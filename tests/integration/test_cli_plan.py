"""`octavo plan`: what it shows and prints as JSON, and the exit code that means no."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import octavo
from helpers.command import Run, only_json, refused
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


# -- several devices, and engines -------------------------------------------------------------------------------------


def test_plan_tells_whether_a_model_fits_when_it_is_spread(llama: Path, run: Run) -> None:
    whole, staging = octavo.plan(llama).final_bytes(), 8 << 20
    rooms = [f"cuda:{number}={whole + staging}" for number in (0, 1)]
    devices = [option for room in rooms for option in ("--device-memory", room)]
    found = only_json(run("plan", llama, "--json", "--staging", staging, *devices))
    assert found["fits"] is True
    assert found["device_memory"] == {f"cuda:{number}": whole + staging for number in (0, 1)}
    assert {name for name in found["devices"] if name.startswith("cuda")} == set(found["devices"])
    assert sum(device["final_bytes"] for device in found["devices"].values()) == whole
    ended = run("plan", llama, "--staging", staging, *devices)
    assert ended.code == 0
    assert "cuda:0: " in ended.out
    assert "fits into" in ended.out


def test_plan_says_no_where_a_spread_model_is_left_for_the_cpu(llama: Path, run: Run) -> None:
    devices = ("--device-memory", "cuda:0=9MiB", "--device-memory", "cuda:1=9MiB", "--staging", "9MiB")
    ended = run("plan", llama, *devices)
    assert ended.code == 1
    assert "cpu: " in ended.out
    assert "does not fit into 0 B" in ended.out
    assert run("plan", llama, *devices, "--device-memory", "cpu=1GiB").code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device-memory", "1GiB", "--device-memory", "2GiB"), "each needs a device: cuda:0=24GiB"),
        (("--device-memory", "cuda:0=lots"), "'lots' is not a size"),
        (("--device-memory", "gpu=1GiB"), "'gpu': write cuda:0=24GiB"),
        (("-tp", "2"), "ranks are an engine's: add --engine vllm"),
        (("--engine", "sglang"), "unknown engine 'sglang'; known: vllm"),
        (("--engine", "vllm", "--scheme", "none"), "without a scheme, octavo has no part in it"),
        (("--engine", "vllm", "--checkpoint"), "leave --checkpoint, --device out"),
        (("--engine", "vllm", "--device-memory", "cuda:0=1GiB"), "one size, that of each rank"),
    ],
)
def test_plan_refuses_what_it_can_not_answer(options: tuple[str, ...], says: str, llama: Path, run: Run) -> None:
    refused(run("plan", llama, *options), says)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_planning_for_an_engine_that_is_not_installed_names_the_command(llama: Path, run: Run) -> None:
    says = "planning for vLLM needs packages that are not installed: pip install 'octavo[vllm]'"
    refused(run("plan", llama, "--engine", "vllm"), says)
