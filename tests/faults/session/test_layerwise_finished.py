"""Tensors that come after their layer was quantized or finished: a duplicate, an update or an error, never lost."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from _layerwise import assert_channel, linears, weights
from torch import nn

from octavo.errors import CoverageError, LoaderError
from octavo.session import Session


def test_a_second_tensor_for_a_finished_weight_is_a_duplicate_or_wins(direct: bool) -> None:
    """The loader fetches the parameter afresh: what it finds holds FP8 numbers."""
    first, second = weights(0)
    names = ["a.weight", "a.weight", "b.weight"]

    def load_into(model: Any, session: Session) -> None:
        for name, tensor in session.pairs(zip(names, (first, second, first), strict=True)):
            model.get_parameter(name).data.copy_(tensor)

    with pytest.raises(CoverageError, match="complete and finished"), Session(model := linears(), direct=direct) as s:
        load_into(model, s)
    with Session(model := linears(), direct=direct, duplicates="update") as session:
        load_into(model, session)
    assert_channel(model["a"], second)
    assert_channel(model["b"], first)


def test_a_parameter_that_replaces_a_finished_one_is_a_duplicate() -> None:
    first, second = weights(0)
    for put in (
        lambda layer, tensor: setattr(layer, "weight", nn.Parameter(tensor, requires_grad=False)),
        lambda layer, tensor: setattr(layer.weight, "data", tensor),
    ):
        with pytest.raises(CoverageError, match="complete and finished"), Session(model := linears("a")) as session:  # noqa: PT012
            for _, tensor in session.pairs([("a", first), ("a", second)]):
                put(model["a"], tensor)


def test_a_tensor_that_comes_after_a_function_finished_its_layer_is_not_lost() -> None:
    def convert(layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.data.half(), requires_grad=False)

    first, second = weights(0)
    for finish in (lambda layer: None, convert):
        session = Session(model := linears(), finish, duplicates="update")
        with pytest.raises(LoaderError, match="finished"), session:  # noqa: PT012
            for name, tensor in session.pairs([("a", first), ("b", first), ("a", second)]):
                model[name].weight.data.copy_(tensor)


def test_a_part_of_scale_groups_that_is_written_once_more_is_not_lost(direct: bool) -> None:
    """The loader changes the tensor between two writes: the first is quantized by then, unless layers are kept."""
    weight = weights(0)[0]
    expected = weight.clone()
    expected[:, :32] += 1
    with contextlib.ExitStack() as stack:
        if direct:
            stack.enter_context(pytest.raises(LoaderError, match="With direct=False"))
        session = stack.enter_context(Session(model := linears("a"), direct=direct))
        for _, tensor in session.pairs([("a", weight.clone())]):
            model["a"].weight.data.copy_(tensor)
            tensor.add_(1)
            model["a"].weight.data[:, :32].copy_(tensor[:, :32])
    if not direct:
        assert_channel(model["a"], expected)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
def test_a_later_tensor_for_a_part_wins_or_is_refused(rows: bool, direct: bool) -> None:
    first, second = weights(0)
    half = second[:32] if rows else second[:, :32]
    with contextlib.ExitStack() as stack:
        if not rows:
            stack.enter_context(pytest.raises(LoaderError, match="scale groups"))
        session = stack.enter_context(Session(model := linears("a"), direct=direct, duplicates="update"))
        for name, tensor in session.pairs([("all", first), ("half", half)]):
            target = model["a"].weight.data
            (target if name == "all" else target[:32] if rows else target[:, :32]).copy_(tensor)
    if rows:
        assert_channel(model["a"], torch.cat([half, first[32:]]))
