"""Schemes beside FP8: what octavo loads in int8 and NVFP4 is what stock loads of octavo's conversion, to the bit.

Where there is no kernel for them, models are made as for one that takes parameters as they were loaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers.folders import edit_tensors, tensors_of
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import Answer, Job, octavo_job, run
from helpers.vllm_loading import load
from octavo.adapters.engine.global_scales import Joined

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]

#: scheme, and the format of the checkpoint that vLLM is told of
CASES = [
    ("int8_channel", "compressed-tensors-w8a8"),
    ("int8_channel", "compressed-tensors"),
    ("nvfp4", "compressed-tensors"),
]
NAMES = ("phi3", "granitemoe")
WIDE = ("llama wide", "qwen2_moe wide")
UNUSED = ("_input_global_scale", "_g_idx", "_g_idx_sort_indices")


def convert(source: Path, scheme: str, format: str = "compressed-tensors") -> Path:
    target = source.with_name(f"{source.name}-{scheme}")
    octavo.convert(source, target, scheme, format=format, prove=False, reader="vllm")
    return target


def loaded(*jobs: Job) -> list[Answer]:
    """Without what no file fills: scales of activations, and an order of columns, which experts have and don't use."""
    answers = load(*jobs, timeout=500)
    for answer in answers:
        for found in (*answer.parameters, *(result[0] for result in answer.results)):
            for name in [name for name in found if name.endswith(UNUSED)]:
                del found[name]
    return answers


@pytest.mark.parametrize(("scheme", "format"), CASES)
def test_parameters_equal_those_of_the_converted_checkpoint(scheme: str, format: str, tmp_path: Path) -> None:
    """Also after new weights have come: in a reload, and from a trainer, in bf16 or as conversions have them."""
    jobs: list[Job] = []
    asked = {"quantization": f"octavo_{scheme}", "model_loader_extra_config": {"format": format}, "kernels": False}
    for name in NAMES:
        old, new = make(name, tmp_path / name), make(name, tmp_path / f"{name}-new", seed=1)
        coded = convert(new, scheme, format)
        steps = [
            ["reload", str(new)],
            ["update", str(old), [list(tensors_of(old))]],
            ["update", str(coded), [list(tensors_of(coded))]],
        ]
        jobs += [
            Job(old, asked, steps),
            octavo_job(new, kernels=False, model_loader_extra_config={"scheme": scheme, "format": format}),
            Job(convert(old, scheme, format), {"kernels": False}),
        ]
    answers = loaded(*jobs)
    for name, mine, new, stock in zip(NAMES, *(answers[first::3] for first in range(3)), strict=True):
        for answer in (mine, new, stock):
            assert not answer.error, f"{name}: {answer.error}"
        assert _quantized(stock), name
        assert mine.parameters == stock.parameters, name
        expected = [[new.parameters[0], True], [mine.parameters[0], True, []], [new.parameters[0], True, []]]
        assert mine.results == expected, name


@pytest.mark.parametrize(("scheme", "format"), CASES)
def test_each_of_two_ranks_has_what_stock_has(scheme: str, format: str, tmp_path: Path) -> None:
    cases, jobs = [], []
    extra = {"model_loader_extra_config": {"scheme": scheme, "format": format}}
    for name in WIDE:
        source = make(name, tmp_path / name.replace(" ", "-"))
        converted = convert(source, scheme, format)
        for rank in range(2):
            options: dict[str, Any] = {"rank": rank, "tensor_parallel_size": 2, "kernels": False}
            cases.append(f"{name}, rank {rank}")
            jobs += [octavo_job(source, **extra, **options), Job(converted, options)]
    answers = loaded(*jobs)
    for case, mine, stock in zip(cases, answers[::2], answers[1::2], strict=True):
        errors = (mine.error, stock.error)
        assert not any(errors), f"{case}: {errors}"
        assert _quantized(stock), case
        assert mine.parameters == stock.parameters, case


def test_joined_matrices_get_one_global_scale(tmp_path: Path) -> None:
    """Stock takes one for all, whatever the others are; of a conversion in which they agree, it reads the same."""
    source = make("qwen2_moe", tmp_path / "bf16")
    large = ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.experts.2.up_proj.weight")

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(large):
                tensors[name][3, 5] = 20.0

    converted = convert(edit_tensors(source, spoil), "nvfp4")

    def settle(tensors: dict[str, Tensor]) -> None:
        for name, others in (("q_proj", ("q_proj", "k_proj", "v_proj")), ("up_proj", ("gate_proj", "up_proj"))):
            for first in [first for first in tensors if first.endswith(f"{name}.weight_scale")]:
                scales = [first.replace(name, other) for other in others]
                divisors = [scale.replace("_scale", "_global_scale") for scale in scales]
                codes = [scale.replace("_scale", "_packed") for scale in scales]
                rows = [len(tensors[each]) for each in scales]
                joined = Joined(*(torch.cat([tensors[n] for n in each]) for each in (codes, scales, divisors)), rows)
                joined.agree()
                tensors.update(zip(scales, torch.split(joined.scales, rows), strict=True))
                tensors.update(zip(divisors, joined.divisors.split(1), strict=True))

    plain = Job(converted, {"kernels": False})
    (before,) = loaded(plain)
    edit_tensors(converted, settle)
    # the first start imports what later ones find imported
    mine, _, again, stock = loaded(*[octavo_job(source, "nvfp4", kernels=False)] * 3, plain)
    for answer in (before, mine, again, stock):
        assert not answer.error, answer.error
    assert mine.parameters == again.parameters == stock.parameters != before.parameters
    assert "plan remembered from an earlier start" in mine.output
    told = [line for line in mine.output.splitlines() if "with different global scales" in line]
    assert len(told) == 3 * len(large)


def test_joined_matrices_that_have_no_global_scale_in_common_are_refused_by_name(tmp_path: Path) -> None:
    """When they are loaded, before any is processed; in an update their layer stays as it was, and waits."""
    source = make("qwen2_moe", tmp_path / "bf16")
    large = ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.experts.2.up_proj.weight")
    attention, experts = "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.experts"

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(large):
                tensors[name][3, 5] = 20_000.0

    shutil.copytree(source, spoiled := tmp_path / "spoiled")
    edit_tensors(spoiled, spoil)
    mine = [f"model.layers.0.self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    update = ["update", str(spoiled), [mine]]
    options: dict[str, Any] = {"quantization": "octavo_nvfp4", "kernels": False}
    kept = {**options, "model_loader_extra_config": {"ignore": [attention, experts]}}
    refused, allowed, updated = loaded(
        Job(spoiled, options), Job(spoiled, kept), Job(source, options, [update, ["reload", str(source)]])
    )
    for part in ("2 problems", attention, experts, "e4m3 rounds some", f"ignore=['{attention}', '{experts}"):
        assert part in refused.error
    assert not allowed.error, allowed.error
    assert not updated.error, updated.error
    (after, _, errors), again = updated.results
    assert len(errors) == 1
    assert errors[0].startswith(f"{attention}: with its new weights, it joins matrices")
    assert after == again[0] == updated.parameters[0]


def test_a_global_scale_of_0_that_a_trainer_sends_is_refused(tmp_path: Path) -> None:
    source = make("qwen2_moe", tmp_path / "bf16")
    converted = convert(make("qwen2_moe", tmp_path / "other", seed=1), "nvfp4")
    shutil.copytree(converted, zero := tmp_path / "zero")
    name = "model.layers.0.self_attn.q_proj.weight_global_scale"
    edit_tensors(zero, lambda tensors: tensors[name].zero_())
    mine = [each for each in tensors_of(zero) if each.startswith("model.layers.0.self_attn.") and "o_proj" not in each]
    steps = [["update", str(zero), [mine]], ["update", str(converted), [list(tensors_of(converted))]]]
    updated, stock = loaded(
        Job(source, {"quantization": "octavo_nvfp4", "kernels": False}, steps), Job(converted, {"kernels": False})
    )
    assert not updated.error, updated.error
    refused, taken = updated.results
    assert refused[0] == updated.parameters[0]
    assert len(refused[2]) == 1
    assert refused[2][0].startswith(f"{name}: holds a number that is not finite, or is not above 0")
    assert taken == [stock.parameters[0], True, []]


def _quantized(answer: Answer) -> bool:
    return any(digest.startswith(("torch.int", "torch.uint8")) for digest in answer.parameters[0].values())


def test_where_vllm_has_no_kernel_it_is_refused_by_name(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    for answer in load(octavo_job(source, "nvfp4"), Job(source, {"quantization": "octavo_nvfp4"})):
        if "vLLM has no kernel for nvfp4 here" not in answer.error:
            assert not answer.error, answer.error
            pytest.skip("it has one")
        assert "Use fp8_channel or fp8_block or int8_channel;" in answer.error


def test_where_there_is_no_kernel_for_int8_weights_alone_the_other_format_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "OctavoPackedLinear")
    extra = {"model_loader_extra_config": {"scheme": "int8_channel", "format": "compressed-tensors"}}
    (answer,) = load(octavo_job(make("llama", tmp_path / "bf16"), **extra))
    assert "vLLM has no kernel for int8_channel here" in answer.error
    assert "Use the format 'compressed-tensors-w8a8' or fp8_channel or fp8_block;" in answer.error


def test_experts_of_int8_weights_alone_stay_where_vllm_has_no_kernel_for_them(tmp_path: Path) -> None:
    source = make("qwen2_moe", tmp_path / "bf16")
    extra = {"scheme": "int8_channel", "format": "compressed-tensors"}
    options = {"load_format": "octavo", "model_loader_extra_config": extra}
    strict = {**options, "model_loader_extra_config": {**extra, "strict": True}}
    alone, refused = load(Job(source, options), Job(source, strict))
    assert not alone.error, alone.error
    words = [name for name, digest in alone.parameters[0].items() if digest.startswith("torch.int8")]
    assert len(words) == 8  # q, k and v; o; gate and up; down
    for said in (alone.output, refused.error):
        assert "vLLM can't make this layer in int8_channel" in said
        assert "; the format 'compressed-tensors-w8a8' has other kernels" in said


def test_a_shape_that_a_trainer_sends_has_to_be_that_of_the_weight(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    converted, name = convert(source, "int8_channel"), "model.layers.0.self_attn.q_proj.weight_shape"
    edit_tensors(converted, lambda tensors: tensors[name].add_(4))
    update = ["update", str(converted), [list(tensors_of(converted))]]
    extra = {"model_loader_extra_config": {"scheme": "int8_channel", "format": "compressed-tensors"}}
    (answer,) = loaded(Job(source, {"load_format": "octavo", **extra}, [update]))
    assert not answer.error, answer.error
    (_, _, errors) = answer.results[0]
    assert errors[0].startswith(f"{name}: says [132, 132], and the model was loaded with [128, 128]")


def test_a_version_that_cant_be_asked_is_not_said_to_have_no_kernel() -> None:
    from octavo.adapters.vllm import versions

    class Renamed:
        """Without what is asked."""

    class Changed:
        """It wants to know more."""

        def _get_scheme_from_parts(self, weights: None, *, layer: str) -> None:
            raise AssertionError

        def _check_scheme_supported(self, capability: int) -> None:
            raise AssertionError

    class Lacking:
        def _get_scheme_from_parts(self, *parts: None) -> None:
            raise RuntimeError("no kernel")

        def _check_scheme_supported(self, capability: int) -> None:
            raise AssertionError

    versions.check_kernel(Renamed(), None, None, None, None)
    versions.check_kernel(Changed(), None, None, None, None)
    with pytest.raises(RuntimeError, match="no kernel"):
        versions.check_kernel(Lacking(), None, None, None, None)


@pytest.mark.usefixtures("vllm_engine")
@pytest.mark.parametrize("format", ["compressed-tensors-w8a8", "compressed-tensors"])
def test_int8_is_served_with_the_tokens_of_the_converted_checkpoint(format: str, tmp_path: Path) -> None:
    source = make("smollm2", tmp_path / "bf16")
    extra = {"model_loader_extra_config": {"scheme": "int8_channel", "format": format}}
    mine, stock = run(octavo_job(source, **extra), Job(convert(source, "int8_channel", format)))
    for answer in (mine, stock):
        assert not answer.error, answer.error
    assert mine.tokens == stock.tokens
    assert mine.logprobs == stock.logprobs
    assert mine.parameters == stock.parameters
