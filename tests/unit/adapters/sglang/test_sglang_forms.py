"""Layers in two forms, in toys of SGLang's: what processing may do to weights, and what new ones come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.adapters.sglang.forms import Forms
from octavo.errors import CheckpointError


class Method:
    def __init__(self, process: Callable[[Any], None]) -> None:
        self.process = process

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.process(layer)


class Linear(nn.Module):
    def __init__(self, process: Callable[[Any], None]) -> None:
        super().__init__()
        self.weight = frozen(torch.zeros(3, 4))
        self.weight.loader = "its own"  # type: ignore[attr-defined]
        self.quant_method = Method(process)


def frozen(data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


def turn(layer: Any) -> None:
    layer.weight = frozen(layer.weight.t())


def pack(layer: Any) -> None:
    layer.weight = frozen(layer.weight.flip(0).clone())
    layer.packed = True


def double_once(layer: Any) -> None:
    """As SGLang does with scales, which it marks."""
    if not getattr(layer.weight, "is_double", False):
        layer.weight.mul_(2)
        layer.weight.is_double = True


def derive(layer: Any) -> None:
    layer.sums = layer.weight.sum(1)


WAYS: dict[str, tuple[Callable[[Any], None], Callable[[Tensor], Tensor]]] = {
    "turned": (turn, lambda weight: weight.t()),
    "in other memory": (pack, lambda weight: weight.flip(0)),
    "in place, once": (double_once, lambda weight: weight * 2),
    "left": (lambda layer: None, lambda weight: weight),
    "with something beside": (derive, lambda weight: weight),
}


def loaded(process: Callable[[Any], None]) -> tuple[nn.Sequential, Forms]:
    """A model of one layer, processed."""
    model = nn.Sequential(Linear(process))
    fillers = {"0": {"a": frozenset({"weight"}), "b": frozenset({"weight"})}}
    forms = Forms(model, fillers, lambda method: method is not None)
    model[0].weight.fill_(1)
    model[0].quant_method.process_weights_after_loading(model[0])  # type: ignore[union-attr, operator]
    return model, forms


def held(layer: Any) -> dict[str, tuple[Tensor, int]]:
    tensors = {"weight": layer.weight, **({"sums": layer.sums} if hasattr(layer, "sums") else {})}
    return {name: (tensor, tensor.data_ptr()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("way", WAYS)
def test_new_weights_are_processed_into_the_memory_of_the_old(way: str) -> None:
    process, expected = WAYS[way]
    model, forms = loaded(process)
    layer, first = model[0], held(model[0])
    for number in (2.0, 3.0):
        new = torch.arange(12.0).reshape(3, 4) * number
        old = layer.weight.clone()
        with torch.no_grad(), forms.of_checkpoint():
            forms["0"].begin()
            assert layer.weight.shape == (3, 4)
            assert layer.weight.loader == "its own"
            assert not hasattr(layer, "packed")
            layer.weight[:2] = new[:2]
            assert not forms["0"].complete()  # a row is left
        assert torch.equal(layer.weight, old)
        with torch.no_grad(), forms.of_checkpoint():
            layer.weight[2:] = new[2:]
            assert forms["0"].complete()
        assert torch.equal(layer.weight, expected(new))
        if process is derive:
            assert torch.equal(layer.sums, new.sum(1))
        now = held(layer)
        assert all(now[name][0] is first[name][0] and now[name][1] == first[name][1] for name in first)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_dropped_leaves_the_layer_as_it_was(way: str) -> None:
    model, forms = loaded(WAYS[way][0])
    before, first = model[0].weight.clone(), held(model[0])
    with torch.no_grad(), forms.of_checkpoint():
        forms["0"].begin()
        model[0].weight.fill_(5)
    with torch.no_grad(), forms.of_checkpoint():
        forms["0"].drop()
    assert torch.equal(model[0].weight, before)
    assert held(model[0])["weight"][1] == first["weight"][1]
    assert not forms["0"].waits


def test_a_layer_is_not_processed_twice() -> None:
    model, _ = loaded(turn)
    model[0].quant_method.process_weights_after_loading(model[0])  # type: ignore[union-attr, operator]
    assert model[0].weight.shape == (4, 3)


def test_what_becomes_something_else_is_refused_and_the_layer_stays() -> None:
    def cut(layer: Any) -> None:
        layer.weight = frozen(layer.weight[: int(layer.weight[0, 0])])

    model, forms = loaded(cut)
    with torch.no_grad(), forms.of_checkpoint():
        forms["0"].begin()
        model[0].weight.fill_(2)
        with pytest.raises(CheckpointError, match=r"0\.weight: SGLang made .* \[1, 4\] .* \[2, 4\] of new ones"):
            forms["0"].complete()
    assert torch.equal(model[0].weight, torch.ones(1, 4))


def test_nothing_is_written_where_no_memory_is_left() -> None:
    model, forms = loaded(pack)
    with torch.no_grad(), forms.of_checkpoint(), pytest.raises(RuntimeError):
        model[0].weight.copy_(torch.zeros(3, 4))
    assert torch.equal(model[0].weight, torch.ones(3, 4))


def test_a_dry_run_sees_strides_where_no_memory_is_left() -> None:
    model, forms = loaded(pack)
    with torch.no_grad(), forms.of_checkpoint():
        assert model[0].weight.stride() == (0, 0)
        with forms.outlined():
            assert model[0].weight.stride() == (4, 1)
            assert model[0].weight.untyped_storage().nbytes() == 0
        assert model[0].weight.stride() == (0, 0)
    assert torch.equal(model[0].weight, torch.ones(3, 4))
