"""Memory that nothing was written to, that comes late, or that changes unseen: its values are right, or it is named."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from _layerwise import assert_channel, linears, staged, weights
from torch import Tensor, nn

from helpers import random_weights
from helpers.layerwise import assert_quantized, one_linear
from octavo.errors import CoverageError, LoaderError
from octavo.session import Session


def test_a_half_that_never_comes_into_staging_is_found() -> None:
    with pytest.raises(LoaderError, match=r"a\.weight.*nothing was written to"), Session(one_linear(128)) as session:  # noqa: PT012
        pairs = dict(session.pairs([("q", weights(0)[0])]))
        staged(session.model["a"].weight.data, [pairs["q"]])


def test_memory_put_in_a_parameters_place_must_hold_values() -> None:
    with pytest.raises(LoaderError, match=r"a\.weight.*nothing was written to"), Session(model := linears("a")):
        model["a"].weight = nn.Parameter(torch.empty(64, 64, dtype=torch.bfloat16), requires_grad=False)


# -- parameters that come late ----------------------------------------------------------------------------------------


LATE: dict[str, Callable[[Any, Tensor], Any]] = {
    "filled before": lambda layer, values: setattr(layer, "bias", nn.Parameter(torch.empty(64).copy_(values), False)),
    "made of values": lambda layer, values: setattr(layer, "bias", nn.Parameter(values.clone(), False)),
    "filled after": lambda layer, values: (
        setattr(layer, "bias", nn.Parameter(torch.empty(64), False)),
        layer.bias.data.copy_(values),
    ),
    "half and half": lambda layer, values: (
        setattr(layer, "bias", nn.Parameter(half := torch.empty(64), False)),
        half[:32].copy_(values[:32]),
        layer.bias.data[32:].copy_(values[32:]),
    ),
    "given values": lambda layer, values: (
        setattr(layer, "bias", nn.Parameter(torch.empty(64), False)),
        setattr(layer.bias, "data", values.clone()),
    ),
    "unseen": lambda layer, values: (
        setattr(layer, "bias", nn.Parameter(torch.empty(64), False)),
        layer.bias.data.numpy().__setitem__(slice(None), values.numpy()),
    ),
}


@pytest.mark.parametrize("way", LATE)
def test_a_late_parameter_that_gets_its_values_is_as_it_came(way: str, direct: bool) -> None:
    values = torch.arange(64.0)
    model = linears("a")
    with Session(model, direct=direct) as session:
        for _, tensor in session.pairs([("a", weights(0)[0])]):
            LATE[way](model["a"], values)
            model["a"].weight.data.copy_(tensor)
    assert torch.equal(model["a"].bias.data, values)
    assert_channel(model["a"], weights(0)[0])


def test_a_late_parameter_that_is_never_loaded_is_named() -> None:
    model = linears("a")
    with pytest.raises(CoverageError, match="a.bias"), Session(model) as session:  # noqa: PT012, RUF043
        for _, tensor in session.pairs([("a", weights(0)[0])]):
            model["a"].weight.data.copy_(tensor)
            model["a"].bias = nn.Parameter(torch.empty(64), requires_grad=False)


def test_a_late_parameter_of_which_half_is_loaded_is_named() -> None:
    with pytest.raises(CoverageError, match=r"a\.bias.*\[32:64\]"), Session(model := linears("a")) as session:  # noqa: PT012
        for _, tensor in session.pairs([("a", weights(0)[0])]):
            model["a"].bias = nn.Parameter(torch.empty(64), requires_grad=False)
            model["a"].bias.data[:32].copy_(torch.ones(32))
            model["a"].weight.data.copy_(tensor)


# -- memory that changes unseen ---------------------------------------------------------------------------------------


_NATIVE = torch.library.Library("octavo_tests", "DEF")
_NATIVE.define(
    "receive(Tensor memory, Tensor values) -> ()"
)  # as collectives and engines' kernels: says no word of writing
_NATIVE.impl(
    "receive",
    lambda memory, values: ctypes.memmove(memory.data_ptr(), values.data_ptr(), values.nbytes) and None,
    "CPU",
)


def _by_numpy(memory: Tensor) -> Callable[[Tensor], Tensor]:
    array = memory.view(torch.int16).numpy()
    return lambda values: (array.__setitem__(..., values.view(torch.int16).numpy()), memory)[1]


def _by_numpy_again(memory: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: _by_numpy(memory)(values)


def _by_numpys_own(memory: Tensor) -> Callable[[Tensor], Tensor]:
    array = memory.view(torch.int16).numpy().copy()
    of_array = torch.from_numpy(array).view(torch.bfloat16)
    return lambda values: (array.__setitem__(..., values.view(torch.int16).numpy()), of_array)[1]


def _by_address(memory: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: (ctypes.memmove(memory.data_ptr(), values.data_ptr(), values.nbytes), memory)[1]


def _by_operation(memory: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: (torch.ops.octavo_tests.receive(memory, values), memory)[1]


@pytest.mark.parametrize("way", [_by_numpy, _by_numpy_again, _by_numpys_own, _by_address, _by_operation])
def test_memory_that_is_received_into_unseen_is_read_before_it_changes(
    way: Callable[[Tensor], Callable[[Tensor], Tensor]], direct: bool
) -> None:
    """Of one pair a loader receives several tensors, each into the same memory, on a load and on an update."""
    halves = random_weights((2, 32, 64), torch.bfloat16, 0)

    def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
        for _ in pairs:
            receive = way(torch.empty(32, 64, dtype=torch.bfloat16))
            for number, half in enumerate(halves):
                model[0].weight.data[32 * number : 32 * number + 32].copy_(receive(half))

    for scheme in ("fp8_channel", "mxfp8"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
        session = Session(model, scheme, direct=direct)
        for factor in (1, 3):
            halves = halves * factor
            with session:
                load(session.pairs([("all", torch.zeros(1))]))
            assert_quantized(model[0], halves.flatten(0, 1), scheme)
