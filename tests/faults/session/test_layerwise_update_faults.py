"""Updates in parts, in any order, or that fail: addresses stay, what is new is told, and running them again heals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _layerwise import (
    DENSE,
    EXPERT,
    MOE,
    SMALL,
    UP,
    K,
    Pairs,
    assert_channel,
    linears,
    load,
    nonfinite,
    weights,
    without,
)
from torch import Tensor, nn

from helpers import same_bytes
from helpers.engine import Model, fused_parts
from helpers.layerwise import assert_quantized_like, loaded_plainly
from octavo.errors import LoaderError, UpdateError
from octavo.numerics import schemes
from octavo.session import Session
from octavo.session.held import Held


def assert_holds(model: Model, pairs: Pairs, scheme: str) -> None:
    """What a load of the pairs would give."""
    fresh = Model(SMALL, moe=model.moe)
    assert_quantized_like(model, loaded_plainly(fresh, pairs), dict(fused_parts(fresh)), scheme)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_updates_in_any_order_keep_addresses_and_have_the_right_bytes(scheme: str, moe: bool) -> None:
    pairs = MOE if moe else DENSE
    model, session = load(pairs, moe=moe, finish=scheme)
    addresses = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    for seed in range(3):
        new = [(name, (tensor * (seed + 2)).roll(seed, 0)) for name, tensor in pairs]
        with session:
            model.load_weights(iter(random.Random(seed).sample(new, len(new))))
        assert_holds(model, new, scheme)
        assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == addresses


def test_a_partial_update_changes_what_it_brings_and_nothing_else() -> None:
    model, session = load(MOE, moe=True, finish="fp8_block")
    new = [(K, dict(MOE)[K] * 3), (EXPERT, dict(MOE)[EXPERT] * 2)]
    with session:
        model.load_weights(iter(new))
    assert_holds(model, [*without(MOE, K, EXPERT), *new], "fp8_block")


def test_an_update_that_puts_new_parameters_in_place_keeps_addresses() -> None:
    def new(m: Any) -> list[tuple[nn.Module, Tensor]]:
        return [(m["a"], weights(1)[0]), (m["norm"], torch.full((64,), 2.0))]

    for put in (
        lambda layer, tensor: setattr(layer, "weight", nn.Parameter(tensor, requires_grad=False)),
        lambda layer, tensor: setattr(layer.weight, "data", tensor),
    ):
        model = linears("a")
        model["norm"] = nn.LayerNorm(64, bias=False)
        with Session(model) as session:
            session.load([("a.weight", weights(0)[0]), ("norm.weight", torch.ones(64))])
        before = [(p, p.data_ptr()) for p in model.parameters()]
        with session:
            for layer, tensor in new(model):
                put(layer, tensor)
        after = [(p, p.data_ptr()) for p in model.parameters()]
        assert all(p is q and at == to for (p, at), (q, to) in zip(before, after, strict=True))
        assert_channel(model["a"], weights(1)[0])
        assert model["norm"].weight.eq(2).all()


def test_an_update_of_a_parameter_that_a_loader_has_held_is_quantized() -> None:
    """It kept the FP8 parameter that it found after the load, and copies to that."""
    with Session(model := linears("a")) as session:
        session.load([("a.weight", weights(0)[0])])
    held, new = model["a"].weight, weights(1)[0]
    with session:
        for _, tensor in session.pairs([("a.weight", new)]):
            held.data.copy_(tensor)
    assert model["a"].weight is held
    assert_channel(model["a"], new)


def test_an_update_that_fails_says_which_layers_are_new_and_running_it_again_heals() -> None:
    model, session = load(DENSE, finish="fp8_channel")
    new = [(name, tensor * 2) for name, tensor in DENSE]

    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield from itertools.takewhile(lambda pair: pair[0] != K, new)
        raise OSError("the trainer is gone")

    with pytest.raises(UpdateError, match="the trainer is gone") as caught, session:
        model.load_weights(breaking())
    error = caught.value
    assert error.torn == ("layers.1.self_attn.qkv_proj",)
    assert "layers.0.mlp.down_proj" in error.new
    assert "layers.1.mlp.gate_up_proj" in error.old
    assert set(error.new) | set(error.old) | set(error.torn) == {layer.name for layer in session.inventory.layers}
    assert model.layers[0].mlp.down_proj.weight.dtype == torch.float8_e4m3fn
    with session:
        model.load_weights(iter(new))
    assert_holds(model, new, "fp8_channel")


def test_a_weight_of_an_update_that_is_not_finite_changes_nothing() -> None:
    model, session = load(DENSE, finish="fp8_channel")
    with pytest.raises(UpdateError, match="not finite") as caught, session:
        model.load_weights(iter(nonfinite([pair for pair in DENSE if pair[0] == UP], UP)))
    assert caught.value.torn == ()
    assert caught.value.new == ()
    assert_holds(model, DENSE, "fp8_channel")


def test_an_update_with_parts_of_scale_groups_waits_for_the_others() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    weight = torch.randn(8, 64)
    with Session(model, "fp8_channel") as session:
        session.load([("a.weight", weight)])
    with session:
        for name, half in session.pairs([("left", weight[:, :32] * 3), ("right", weight[:, 32:] * 3)]):
            model["a"].weight.data[:, slice(0, 32) if name == "left" else slice(32, 64)].copy_(half)
    assert same_bytes(model["a"].weight.data, schemes.quantize(weight * 3, "fp8_channel")[0])
    new = model["a"].weight.data.clone()
    with (
        pytest.raises(UpdateError, match=r"only parts of scale groups came; nothing wrote \[0:8, 32:64\]") as caught,
        session,
    ):
        model["a"].weight.data[:, :32].copy_(weight[:, :32])
    assert caught.value.old == ("a",)
    assert same_bytes(model["a"].weight.data, new)


def test_what_waits_for_the_rest_of_its_scale_groups_is_not_tried_again_for_each_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    press_rest = Held.press_rest

    def noted(held: Held, item: Any, **how: Any) -> None:
        tried.append(item.name)
        press_rest(held, item, **how)

    monkeypatch.setattr(Held, "press_rest", noted)
    names = "abcdefgh"
    new = dict(zip(names, torch.randn(8, 64, 64).bfloat16(), strict=True))
    with Session(model := linears(names)) as session:
        session.load([(f"{name}.weight", tensor / 2) for name, tensor in new.items()])
    halves = [(f"{name}{at}", new[name][:, at : at + 32]) for at in (0, 32) for name in names]
    tried.clear()
    with session:
        for name, half in session.pairs(halves):
            begin = int(name[1:])
            model[name[0]].weight.data[:, begin : begin + 32].copy_(half)
    assert sorted(tried) == sorted(f"{name}.weight" for name in 2 * names)
    for name in names:
        assert_channel(model[name], new[name])


def test_an_update_that_cannot_begin_leaves_the_model_as_it_was() -> None:
    with Session(model := linears()) as session:
        session.load([("a.weight", weights(0)[0]), ("b.weight", weights(0)[1])])
    scale, before = model["b"]._parameters.pop("weight_scale"), model["a"].weight
    with pytest.raises(LoaderError, match="b.weight: the model no longer has"):  # noqa: RUF043
        session.__enter__()
    assert model["a"].weight is before
    model["b"]._parameters["weight_scale"] = scale
    with session:
        session.load([("a.weight", weights(1)[0])])
    assert_channel(model["a"], weights(1)[0])


def test_a_bare_reload_after_quantizing_is_refused() -> None:
    model, _ = load(DENSE)
    with pytest.raises((LoaderError, TypeError, AssertionError), match="would overwrite them without their scale"):
        model.load_weights(iter(DENSE[4:]))


def test_layers_that_a_function_finished_are_not_updated() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    with Session(model, lambda layer: None) as session:
        session.load([("a.weight", torch.ones(8, 64))])
    with pytest.raises(LoaderError, match="can't be updated in place"):
        session.__enter__()
