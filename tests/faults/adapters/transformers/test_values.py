"""Checkpoints with weights that are not finite: `octavo.load` names the tensor and the place, and no model is left."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import MODEL, fails
from torch import Tensor

import octavo
from helpers.folders import edit_tensors
from octavo.errors import CoverageError, WeightError

pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
VALUES = {"NaN": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}
PLACES = {"in the first row": (0, 7), "in the last element": (31, 31)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _poison(
    name: str, place: tuple[int, ...], value: float, dtype: torch.dtype | None = None
) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype)
        tensors[name][place] = value

    return edit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", PLACES)
def test_weight_that_is_not_finite_is_named_with_its_place(dtype: str, value: str, place: str, llama: Path) -> None:
    edit_tensors(llama, _poison(Q, PLACES[place], VALUES[value], DTYPES[dtype]))
    says = (MODEL, f"tensor {Q!r} holds {VALUES[value]}", f"at {list(PLACES[place])}", f"ignore=[{Q!r}]")
    fails(WeightError, says, lambda: octavo.load(llama))


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
@pytest.mark.parametrize("threads", [1, 5])
def test_expert_that_is_not_finite_is_named_in_every_scheme(scheme: str, threads: int, moe: Path) -> None:
    edit_tensors(moe, _poison(EXPERT.format(1, "up"), (3, 5), float("nan")))
    says = (MODEL, f"tensor {EXPERT.format(1, 'up')!r} holds nan", f"of {STACK}", f"ignore=[{STACK!r}]")
    fails(WeightError, says, lambda: octavo.load(moe, scheme, threads=threads))


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
def test_transposed_stack_that_is_not_finite_is_named_in_every_scheme(scheme: str, gpt_oss: Path) -> None:
    edit_tensors(gpt_oss, _poison(DOWN, (1, 3, 5), float("-inf")))
    fails(WeightError, (MODEL, f"tensor {DOWN!r} holds -inf"), lambda: octavo.load(gpt_oss, scheme))


def test_place_in_a_transposed_stack_is_that_of_the_checkpoint(gpt_oss: Path) -> None:
    edit_tensors(gpt_oss, _poison(DOWN, (1, 3, 5), float("nan")))
    fails(WeightError, "[1, 3, 5]", lambda: octavo.load(gpt_oss))


def test_not_finite_weight_is_named_on_the_route_through_from_pretrained(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit_tensors(llama, _poison(Q, (2, 2), float("nan")))
    load = AutoModelForCausalLM.from_pretrained
    says = (MODEL, f"tensor {Q!r} holds nan")
    fails(WeightError, says, lambda: load(llama, quantization_config=octavo.OctavoConfig()))


def test_advice_about_a_weight_that_is_not_finite_works(llama: Path) -> None:
    edit_tensors(llama, _poison(Q, (2, 2), float("nan")))
    kept = octavo.load(llama, ignore=[Q])
    assert kept.get_parameter(Q).isnan().sum() == 1


@pytest.mark.parametrize("fault", ["found in the headers", "found while reading"])
def test_failed_load_leaves_no_model_behind(fault: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.adapters.transformers import skeleton as adapter

    made: list[weakref.ref[Any]] = []
    original = adapter.skeleton

    def skeleton(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(adapter, "skeleton", skeleton)
    if fault == "found in the headers":
        edit_tensors(llama, lambda tensors: tensors.pop(Q))
        fails(CoverageError, Q, lambda: octavo.load(llama))
    else:
        edit_tensors(llama, _poison(Q, (2, 2), float("nan")))
        fails(WeightError, Q, lambda: octavo.load(llama))
    gc.collect()
    assert [ref() for ref in made] == [None]
