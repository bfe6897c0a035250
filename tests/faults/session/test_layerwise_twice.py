"""Sessions that would meet: on one model, its parts, or one that shares its parameters. The second is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _layerwise import linears, weights
from torch import nn

import octavo
from helpers.layerwise import assert_quantized
from octavo.errors import LoaderError


def _parent(model: Any) -> nn.Module:
    return nn.ModuleDict({"inner": model, "more": nn.Linear(64, 64)})


def _sharing(model: Any) -> nn.Module:
    other = linears("c")
    other["c"].weight = model["b"].weight
    return other


def _viewing(model: Any) -> nn.Module:
    other = nn.ModuleDict({"c": nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)})
    other["c"].weight = nn.Parameter(model["b"].weight.detach()[:32])
    return other


OTHERS: dict[str, Callable[[Any], nn.Module]] = {
    "the model itself": lambda model: model,
    "a layer of it": lambda model: model["b"],
    "a model that it is a part of": _parent,
    "a model that shares a parameter": _sharing,
    "a model whose parameter is a view of one": _viewing,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("thread", [False, True], ids=["in this thread", "in another"])
def test_a_second_session_is_refused_and_the_first_goes_on(make: Callable[[Any], nn.Module], thread: bool) -> None:
    model, values = linears(), weights(0)
    second = octavo.layerwise(make(model))
    raised: list[BaseException] = []

    def enter() -> None:
        try:
            with second:
                pass
        except LoaderError as error:
            raised.append(error)

    with octavo.layerwise(model) as session:
        session.load([("a.weight", values[0])])
        if thread:
            other = threading.Thread(target=enter)
            other.start()
            other.join()
        else:
            enter()
        session.load([("b.weight", values[1])])
    text = (
        "this ModuleDict has a session already" if second.model is model else "another session or update is busy with"
    )
    assert text in str(raised[0])
    for name, weight in zip("ab", values, strict=True):
        assert_quantized(model[name], weight, "fp8_channel")


def test_an_update_during_a_session_is_refused() -> None:
    model, values = linears(), weights(0)
    session = octavo.layerwise(model)
    with session:
        session.load(zip(("a.weight", "b.weight"), values, strict=True))
    new = weights(1)
    with session:
        session.load([("a.weight", new[0])])
        with pytest.raises(LoaderError, match="another session or update is busy"):
            octavo.update(model["b"], [("weight", new[1])])
    octavo.update(model, [("b.weight", new[1])])  # whoever has left is in nobody's way
    for name, weight in zip("ab", new, strict=True):
        assert_quantized(model[name], weight, "fp8_channel")


def test_a_session_that_failed_is_in_nobodys_way() -> None:
    model, values = linears(), weights(0)
    with pytest.raises(ZeroDivisionError), octavo.layerwise(model):
        raise ZeroDivisionError
    with octavo.layerwise(model) as session:
        session.load(zip(("a.weight", "b.weight"), values, strict=True))
    assert_quantized(model["a"], values[0], "fp8_channel")


def _load_it(model: Any) -> None:
    with octavo.layerwise(model) as session:
        session.load(zip(("a.weight", "b.weight"), weights(0), strict=True))


def _replace(model: Any) -> None:
    model["b"].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))


def _tie(model: Any) -> None:
    model["b"].weight = model["a"].weight


CHANGES: dict[str, Callable[[Any], object]] = {
    "another session loaded it": _load_it,
    "a parameter was replaced": _replace,
    "parameters were tied": _tie,
    "it was cast": lambda model: model.float(),
    "it went to meta": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_session_made_before_the_model_changed_is_refused(change: Callable[[Any], object]) -> None:
    model = linears()
    session = octavo.layerwise(model)
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoaderError, match="Make the session anew"), session:
        pytest.fail("entered")
    after = model.state_dict()
    assert all(tensor.is_meta or torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_pairs_of_a_session_end_with_it() -> None:
    model, values = linears("a"), weights(0, 1)
    session = octavo.layerwise(model)
    with session:
        session.load([("a.weight", values[0])])
    with session:
        pairs = session.pairs([("a.weight", values[0] + 1)])
    with pytest.raises(LoaderError, match="a session's that has been left"):
        next(pairs)
    assert_quantized(model["a"], values[0], "fp8_channel")


def test_modules_of_other_threads_are_made_as_ever() -> None:
    model, values, made = linears("a"), weights(0, 1), []

    def make() -> None:
        made.append(nn.Linear(4, 4))
        made[0].weight = nn.Parameter(torch.ones(4, 4))
        model["a"].more = nn.Parameter(torch.ones(1))

    with octavo.layerwise(model) as session:
        other = threading.Thread(target=make)
        other.start()
        other.join()
        session.load([("a.weight", values[0])])
    assert torch.equal(made[0].weight, torch.ones(4, 4))
    assert list(session.report.kept) == []  # whoever adds a parameter in another thread is not followed
