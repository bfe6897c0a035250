"""Weights that never come, twice or in any order: no early finish, no silent success, nothing that looks loaded."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _layerwise import DENSE, EXPERT, MOE, SMALL, UP, K, Pairs, load, nonfinite, without
from torch import Tensor, nn

from helpers import same_bytes
from helpers.engine import Model
from octavo.errors import CoverageError, LoaderError, WeightError
from octavo.numerics import schemes
from octavo.session import Session


def failing(pairs: Pairs, error: type[Exception], text: str, *, moe: bool = False, **options: Any) -> Session:
    """Loading the pairs raises, and leaves nothing that looks loaded."""
    model = Model(SMALL, moe=moe)
    session = Session(model, **options)
    with pytest.raises(error, match=text), session:
        model.load_weights(iter(pairs))
    assert session.failed
    finished = {event.layer for event in session.events if event.kind == "finish"}
    for layer in session.inventory.layers:
        for parameter in layer.module.parameters(recurse=False):
            assert parameter.is_meta == (layer.name not in finished), layer.name
    with pytest.raises(LoaderError, match="build model and session anew"):
        session.__enter__()
    return session


def test_half_of_a_layer_that_never_comes_is_named_with_its_box(direct: bool) -> None:
    failing(
        without(DENSE, UP),
        CoverageError,
        r"layers.0.mlp.gate_up_proj.weight \[192, 64\]: nothing wrote \[96:192, 0:64\]",
        direct=direct,
    )
    failing(
        without(MOE, EXPERT),
        CoverageError,
        r"experts.w13_weight \[2, 192, 64\]: nothing wrote \[1:2, 96:192, 0:64\]",
        moe=True,
        direct=direct,
    )


def test_a_layer_without_any_weights_is_named(direct: bool) -> None:
    failing(
        without(DENSE, "layers.1.mlp.down_proj.weight"),
        CoverageError,
        r"down_proj.weight \[64, 96\]: nothing was loaded",
        direct=direct,
    )
    failing([], CoverageError, f"{len(list(Model(SMALL).parameters()))} problems", direct=direct)


def test_one_half_twice_and_the_other_never_is_no_complete_layer(direct: bool) -> None:
    """As many elements as the layer has: a count would be content."""
    gate = dict(DENSE)[UP.replace("up", "gate")]
    pairs = [
        (name if name != UP else UP.replace("up", "gate"), tensor if name != UP else gate) for name, tensor in DENSE
    ]
    session = failing(
        pairs, CoverageError, r"gate_up_proj.weight\[0:96, 0:64\] is written twice: by .*gate_proj", direct=direct
    )
    assert not any(e.kind == "finish" and e.layer == "layers.0.mlp.gate_up_proj" for e in session.events)


def test_a_shard_that_is_read_twice_is_an_error_even_under_the_same_name(direct: bool) -> None:
    at = [name for name, _ in DENSE].index(K)
    failing(
        [*DENSE[: at + 1], DENSE[at], *DENSE[at + 1 :]],
        CoverageError,
        "k_proj.weight, and by .*k_proj.weight",
        direct=direct,
    )
    # after the layer is complete and finished, too
    failing([*DENSE, DENSE[at]], CoverageError, "comes when the layer is complete and finished", direct=direct)


def test_collected_pairs_hide_no_duplicate(direct: bool) -> None:
    """A loader that draws all pairs before it writes: names of the moment would tell nothing."""
    model = Model(SMALL)
    original = model.load_weights
    at = [name for name, _ in DENSE].index(K)
    pairs = [*DENSE[: at + 1], (K, DENSE[at][1].clone()), *DENSE[at + 1 :]]
    with pytest.raises(CoverageError, match="is written twice"), Session(model, direct=direct) as session:
        original(list(session.pairs(pairs)))


def test_a_loader_that_copies_twice_does_not_finish_a_layer_early(direct: bool) -> None:
    """The whole of a half, counted twice, has as many elements as the layer."""
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.Linear(64, 8, bias=False)})
    weight = torch.randn(8, 64)
    with Session(model, "fp8_channel", direct=direct) as session:
        pairs = session.pairs([("low", weight[:4]), ("other", weight), ("high", weight[4:])])
        name, low = next(pairs)
        model["a"].weight.data[:4].copy_(low)
        model["a"].weight.data[:4].copy_(low.clone())
        _, other = next(pairs)
        model["b"].weight.data.copy_(other)
        assert not any(event.kind == "finish" and event.layer == "a" for event in session.events)
        _, high = next(pairs)
        model["a"].weight.data[4:].copy_(high)
    for name in "ab":
        assert same_bytes(model[name].weight.data, schemes.quantize(weight, "fp8_channel")[0])
    assert [event.layer for event in session.events if event.kind == "finish"] == ["b", "a"]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("order", ["reversed", "shuffled", "interleaved"])
def test_any_order_gives_the_same_bytes(order: str, moe: bool, direct: bool) -> None:
    pairs = MOE if moe else DENSE
    expected = {name: p.data.clone() for name, p in load(pairs, moe=moe, finish="fp8_block")[0].named_parameters()}
    if order == "reversed":
        mixed = pairs[::-1]
    elif order == "shuffled":
        mixed = random.Random(5).sample(pairs, len(pairs))
    else:  # of each layer in turn
        first, second = ([pair for pair in pairs if f"layers.{i}." in pair[0]] for i in (0, 1))
        rest = [pair for pair in pairs if "layers." not in pair[0]]
        mixed = [pair for both in zip(first, second, strict=True) for pair in both] + rest
    model, session = load(mixed, moe=moe, finish="fp8_block", direct=direct)
    for name, parameter in model.named_parameters():
        assert same_bytes(parameter.data, expected[name]), name
    finished = [event.layer for event in session.events if event.kind == "finish"]
    assert len(finished) == len(set(finished)) == len(session.inventory.layers)
    for layer in session.inventory.layers:  # each right after its own last write
        kinds = [event.kind for event in session.events if event.layer == layer.name]
        assert kinds.index("finish") == len(kinds) - 1


def test_duplicates_that_are_declared_are_updates(direct: bool) -> None:
    new = [(name, tensor * 2) for name, tensor in DENSE]
    model, _ = load([*DENSE, *new[::-1]], duplicates="update", direct=direct, finish="fp8_block")
    expected, _ = load(new, finish="fp8_block")
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert same_bytes(a.data, b.data), name


def test_a_loader_that_fails_leaves_nothing_that_looks_loaded(direct: bool) -> None:
    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield from DENSE[:9]
        raise OSError("the disk is gone")

    model = Model(SMALL)
    held = dict(model.named_parameters())
    session = Session(model, direct=direct)
    with pytest.raises(OSError, match="the disk is gone"), session:
        model.load_weights(breaking())
    assert "load_weights" not in model.__dict__
    assert model.norm.weight.is_meta
    assert model.layers[1].mlp.down_proj.weight.is_meta
    # whoever still holds a parameter can look at it: it has no memory, and holds no weights
    assert held["norm.weight"].isnan().all()
    assert torch.zeros(3).add_(1).sum() == 3  # no mode is left behind


def test_a_weight_that_is_not_finite_is_named(direct: bool) -> None:
    failing(nonfinite(DENSE, UP), WeightError, "layers.0.mlp.gate_up_proj.weight.*not finite", direct=direct)


def test_zeros_are_no_weights(direct: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8)})
    with pytest.raises(CoverageError, match=r"a.bias \[8\]: nothing was loaded"), Session(model, direct=direct):  # noqa: PT012
        for parameter in model.parameters():
            parameter.data.zero_()
        model["a"].weight.data.copy_(torch.ones(8, 64))
    optional = nn.ModuleDict({"a": nn.Linear(64, 8)})
    before = optional["a"].bias.detach().clone()
    with Session(optional, optional=["*.bias"], direct=direct) as session:
        session.load([("a.weight", torch.ones(8, 64))])
    assert torch.equal(optional["a"].bias, before)


def test_names_and_shapes_that_do_not_fit_are_said() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    for name, shape, text in (("b", (8, 64), "no such parameter"), ("a.weight", (1, 64), r"\[8, 64\] in the model")):
        with pytest.raises(CoverageError, match=text), Session(model) as session:
            session.load([(name, torch.ones(shape))])
        model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})


def test_boxes_that_turn_out_to_share_groups_are_an_error_not_wrong_bytes() -> None:
    """One tensor in pieces of 100 rows, other tensors between them: blocks of 128 rows were cut."""
    model = nn.ModuleDict({"a": nn.Linear(64, 200, bias=False), "b": nn.Linear(64, 8, bias=False)})
    weight = torch.randn(200, 64)
    with pytest.raises(LoaderError, match="Load it with direct=False"), Session(model, "fp8_block"):  # noqa: PT012
        model["a"].weight.data[:100].copy_(weight[:100])
        model["b"].weight.data.copy_(torch.ones(8, 64))
        model["a"].weight.data[100:].copy_(weight[100:])
    model = nn.ModuleDict({"a": nn.Linear(64, 200, bias=False)})
    with Session(model, "fp8_block", direct=False):
        model["a"].weight.data[:100].copy_(weight[:100])
        model["a"].weight.data[100:].copy_(weight[100:])
    assert same_bytes(model["a"].weight.data, schemes.quantize(weight, "fp8_block")[0])
