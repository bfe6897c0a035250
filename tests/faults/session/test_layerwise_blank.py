"""What initialises parameters does not load them: constants and random numbers, whole, in parts, by any operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.layerwise import assert_quantized, one_linear
from octavo.errors import CoverageError
from octavo.session import Session

init = nn.init


def _rows(weight: Tensor) -> None:
    for row in weight:
        row.fill_(0.5)


def _random_rows(weight: Tensor) -> None:
    weight[:8].normal_()
    weight[8:].uniform_()


def _checked(weight: Tensor) -> None:
    weight[:8].zero_()
    weight[8:] = 1
    weight[weight.isnan()] = 0


def _kaiming(weight: Tensor) -> None:
    init.kaiming_uniform_(weight, a=5**0.5)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda w: w.zero_(),
    "one value": lambda w: w.fill_(2),
    "one value of a tensor": lambda w: w.fill_(torch.tensor(2.0)),
    "one value, by item": lambda w: w.__setitem__(slice(None), 2),
    "normal": lambda w: w.normal_(),
    "normal, then scaled": lambda w: w.normal_().mul_(0.02),
    "uniform": lambda w: w.uniform_(-1, 1),
    "random integers": lambda w: w.random_(0, 2),
    "bernoulli": lambda w: w.bernoulli_(0.5),
    "exponential": lambda w: w.exponential_(),
    "cauchy": lambda w: w.cauchy_(),
    "log-normal": lambda w: w.log_normal_(),
    "geometric": lambda w: w.geometric_(0.5),
    "zeros, then noise": lambda w: w.zero_().normal_(),
    "init.trunc_normal_": init.trunc_normal_,
    "init.trunc_normal_, tight": lambda w: init.trunc_normal_(w, std=1.0, a=-0.1, b=0.1),
    "init.orthogonal_": init.orthogonal_,
    "init.kaiming_uniform_": _kaiming,
    "random, then copied": lambda w: w.copy_(torch.randn(w.shape) * 0.02),
    "random, cast and copied": lambda w: w.copy_(torch.rand(w.shape, dtype=torch.float64).sub(0.5).float()),
    "init.xavier_normal_": init.xavier_normal_,
    "init.eye_": init.eye_,
    "into out=": lambda w: torch.ones(w.shape, out=w),
    "row by row": _rows,
    "random, in two parts": _random_rows,
    "constants, in two parts": _checked,
}


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "whole layers"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_initialising_loads_nothing(way: Callable[[Tensor], Any], direct: bool) -> None:
    model = one_linear(16).float()
    session = Session(model, direct=direct)
    with pytest.raises(CoverageError, match=r"a.weight \[16, 64\]: nothing was loaded"), session:
        way(model["a"].weight.data)
    assert model["a"].weight.is_meta or model["a"].weight.isnan().all()


@pytest.mark.parametrize("way", [*WAYS.values()][:-3], ids=[*WAYS][:-3])  # the others write parts, which is padding
def test_what_is_initialised_first_is_loaded_as_ever(way: Callable[[Tensor], Any]) -> None:
    model, weight = one_linear(16).float(), torch.randn(16, 64)
    with Session(model):
        way(model["a"].weight.data)
        model["a"].weight.data.copy_(weight)
    assert_quantized(model["a"], weight, "fp8_channel")


def test_random_pairs_are_loaded() -> None:
    model = one_linear(16)
    with Session(model) as session:
        weight = torch.randn(16, 64).bfloat16()
        session.load([("a.weight", weight)])
    assert_quantized(model["a"], weight, "fp8_channel")


def test_values_with_noise_are_loaded() -> None:
    model, weight = one_linear(16).float(), torch.randn(16, 64)
    with Session(model):
        noise = torch.randn(16, 64)
        noisy = weight + noise
        model["a"].weight.data.copy_(noisy)
    assert_quantized(model["a"], noisy, "fp8_channel")


def test_random_memory_that_gets_values_is_loaded() -> None:
    model, weight = one_linear(16).float(), torch.randn(16, 64)
    with Session(model):
        memory = torch.randn(16, 64)
        memory.copy_(weight)
        model["a"].weight.data.copy_(memory)
    assert_quantized(model["a"], weight, "fp8_channel")


def test_random_memory_that_gets_values_of_a_parameter_is_loaded() -> None:
    model, weight = nn.ModuleDict({name: nn.Linear(64, 16, bias=False) for name in "ab"}), torch.randn(16, 64)
    with Session(model, None):
        memory = torch.randn(16, 64)
        model["a"].weight.data.copy_(weight)
        memory.copy_(model["a"].weight)
        model["b"].weight.data.copy_(memory)
    assert torch.equal(model["b"].weight, weight)


def test_constants_beside_values_are_padding() -> None:
    model, weight = one_linear(16), torch.randn(12, 64).bfloat16()
    with Session(model):
        model["a"].weight.data[12:].zero_()
        model["a"].weight.data[:12].copy_(weight)
    assert_quantized(model["a"], torch.cat([weight, torch.zeros(4, 64).bfloat16()]), "fp8_channel", (16,))


def test_values_added_to_constants_are_loaded() -> None:
    model, bias = nn.ModuleDict({"a": nn.Linear(64, 8)}), torch.randn(8)
    with Session(model):
        model["a"].weight.data.copy_(torch.ones(8, 64))
        model["a"].bias.data[:4].zero_()
        model["a"].bias.data[4:].zero_()
        model["a"].bias.data.add_(bias)
    assert torch.equal(model["a"].bias, bias)


def test_what_may_stay_as_it_is_may_be_initialised() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8)})
    with Session(model, optional=["a.bias"]):
        model["a"].weight.data.copy_(torch.ones(8, 64))
        model["a"].bias.data.fill_(3)
    assert torch.equal(model["a"].bias, torch.full((8,), 3.0))
