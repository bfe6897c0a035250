"""Loads that go wrong layer by layer: no early finish, no silent success, nothing that looks loaded."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import random_weights, same_bytes
from helpers.engine import Model, Rank, Shape, checkpoint, fused_parts
from octavo import schemes
from octavo.errors import CoverageError, LoaderError, UpdateError, WeightError
from octavo.layerwise import Session

SMALL = Shape(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, experts=2, vocab=32)
K = "layers.1.self_attn.k_proj.weight"
UP = "layers.0.mlp.up_proj.weight"
EXPERT = "layers.1.mlp.experts.1.up_proj.weight"
Pairs = list[tuple[str, Tensor]]


def load(pairs: Pairs, *, moe: bool = False, rank: Rank | None = None, **options: Any) -> tuple[Model, Session]:
    model = Model(SMALL, rank, moe=moe)
    session = Session(model, **options)
    with session:
        model.load_weights(iter(pairs))
    return model, session


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


def without(pairs: Pairs, *names: str) -> Pairs:
    return [(name, tensor) for name, tensor in pairs if name not in names]


@pytest.fixture(params=[True, False], ids=["direct", "layer"])
def direct(request: pytest.FixtureRequest) -> bool:
    return request.param


DENSE = list(checkpoint(SMALL).items())
MOE = list(checkpoint(SMALL, moe=True).items())


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


def nonfinite(pairs: Pairs, name: str) -> Pairs:
    return [(n, torch.where(torch.arange(t.shape[-1]) == 3, torch.inf, t) if n == name else t) for n, t in pairs]


def test_a_weight_that_is_not_finite_is_named(direct: bool) -> None:
    failing(nonfinite(DENSE, UP), WeightError, "layers.0.mlp.gate_up_proj.weight.*not finite", direct=direct)


def one(loader: Callable[[Any, Tensor, Session], None], text: str, direct: bool) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.LayerNorm(64)})
    with pytest.raises(LoaderError, match=text), Session(model, "fp8_channel", direct=direct) as session:
        loader(model, torch.ones(8, 64), session)


def test_what_a_loader_may_not_do_is_said(direct: bool) -> None:
    one(lambda m, w, s: m["a"].weight.data.add_(1), "reads it before it is written", direct)
    one(lambda m, w, s: m["a"].weight.data.sum(), "reads it before it is written", direct)
    one(
        lambda m, w, s: m["a"].weight.data.copy_(torch.empty_like(w, device="meta")),
        "on meta, and has no values",
        direct,
    )
    one(lambda m, w, s: m["a"].weight.data.expand(2, 8, 64).copy_(w), "repeats elements", direct)
    one(lambda m, w, s: setattr(m["a"].weight, "data", w[:4]), "another shape", direct)
    one(lambda m, w, s: s.__enter__(), "active already", direct)


def test_a_change_of_what_an_earlier_tensor_wrote_needs_the_layer() -> None:
    def loader(model: Any, w: Tensor, session: Session) -> None:
        for name, tensor in session.pairs([("low", w[:4]), ("high", w[4:])]):
            model["a"].weight.data[slice(0, 4) if name == "low" else slice(4, 8)].copy_(tensor)
            if name == "high":
                model["a"].weight.data.mul_(2)
        for parameter in model["b"].parameters():
            parameter.data.copy_(torch.ones(64))

    one(loader, "With direct=False a layer stays in high precision", True)
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.LayerNorm(64)})
    with Session(model, "fp8_channel", direct=False) as session:
        loader(model, torch.ones(8, 64), session)
    assert same_bytes(model["a"].weight.data, schemes.quantize(torch.full((8, 64), 2.0), "fp8_channel")[0])


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


def test_a_transform_that_no_pair_passes_is_an_error() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    with pytest.raises(LoaderError, match="transform was given, but saw no pair"):  # noqa: SIM117
        with Session(model, transform=lambda name, tensor: (name, tensor)):
            model["a"].weight.data.copy_(torch.ones(8, 64))


def test_a_finish_that_fails_names_the_layer() -> None:
    def finish(layer: nn.Module) -> None:
        raise ValueError("no kernel")

    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    with pytest.raises(LoaderError, match="a: finish failed: ValueError: no kernel"), Session(model, finish) as session:
        session.load([("a.weight", torch.ones(8, 64))])
    assert model["a"].weight.is_meta


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


# -- updates ----------------------------------------------------------------------------------------------------------


def assert_holds(model: Model, pairs: Pairs, scheme: str) -> None:
    expected = Model(SMALL, moe=model.moe)
    expected.load_weights(iter(pairs))
    parts = dict(fused_parts(expected))
    found = dict(model.named_parameters())
    for name, tensor in expected.named_parameters():
        if name in parts:
            q, scale = schemes.quantize(tensor, scheme, parts[name])
            assert same_bytes(found[name].data, q), name
            assert same_bytes(found[f"{name}_scale"].data, scale), name
        else:
            assert same_bytes(found[name].data, tensor.data), name


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


# -- finished weights -------------------------------------------------------------------------------------------------


def linears(names: str = "ab", **options: Any) -> Any:
    return nn.ModuleDict({name: nn.Linear(64, 64, bias=False, dtype=torch.bfloat16, **options) for name in names})


def weights(seed: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 64, generator=generator).mul(10**i).bfloat16() for i in range(count)]


def assert_channel(layer: nn.Module, weight: Tensor) -> None:
    q, scale = schemes.quantize(weight, "fp8_channel")
    assert same_bytes(layer.weight.data, q)
    assert same_bytes(layer.weight_scale.data, scale)


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


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m["a"].weight.data.zero_(),
        lambda m: m["b"].weight.data.copy_(m["a"].weight.data),
        lambda m: m["b"].weight.data.copy_(m["a"].weight.data.float()),
        lambda m: m["a"].weight_scale.data.copy_(torch.ones(64, 1)),
        lambda m: setattr(m["b"], "weight", m["a"].weight),
    ],
    ids=["zero", "copied", "cast", "scale", "tied"],
)
def test_fp8_numbers_are_nothing_for_loaders(touch: Callable[[Any], Any]) -> None:
    first, _ = weights(0)
    with pytest.raises(LoaderError, match="FP8 numbers"), Session(model := linears("abc")) as session:  # noqa: PT012
        for name, tensor in session.pairs([("a", first), ("c", first)]):
            if name == "c":
                touch(model)
            model[name].weight.data.copy_(tensor)


def test_a_parameter_that_replaces_a_finished_one_is_a_duplicate() -> None:
    first, second = weights(0)
    for put in (
        lambda layer, tensor: setattr(layer, "weight", nn.Parameter(tensor, requires_grad=False)),
        lambda layer, tensor: setattr(layer.weight, "data", tensor),
    ):
        with pytest.raises(CoverageError, match="complete and finished"), Session(model := linears("a")) as session:  # noqa: PT012
            for _, tensor in session.pairs([("a", first), ("a", second)]):
                put(model["a"], tensor)


# -- errors that a loader swallows ------------------------------------------------------------------------------------


def swallowing(model: Any, session: Session, pairs: Pairs) -> None:
    for name, tensor in session.pairs(pairs):
        with contextlib.suppress(Exception):
            model[name].weight.data.copy_(tensor)


def test_an_error_that_the_loader_swallows_is_raised_at_the_end(direct: bool) -> None:
    first, second = weights(0)
    with (
        pytest.raises(CoverageError, match="complete and finished"),
        Session(model := linears("a"), direct=direct) as session,
    ):
        swallowing(model, session, [("a", first), ("a", second)])
    bad = first.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(WeightError, match="not finite"), Session(model := linears(), direct=direct) as session:
        swallowing(model, session, [("a", bad), ("b", second)])
    assert model["a"].weight.is_meta


def test_a_finish_whose_error_the_loader_swallows_fails_the_load() -> None:
    def finish(layer: nn.Module) -> None:
        if layer is model["a"]:
            raise ValueError("no kernel")

    model = linears("abc")
    with pytest.raises(LoaderError, match="no kernel"), Session(model, finish):  # noqa: PT012
        with contextlib.suppress(LoaderError):
            for name in "ab":
                model[name].weight.data.copy_(weights(0)[0])
        for name in "bc":
            model[name].weight.data.copy_(weights(0)[0])
    assert model["a"].weight.is_meta


def test_a_tensor_that_comes_after_a_function_finished_its_layer_is_not_lost() -> None:
    def convert(layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.data.half(), requires_grad=False)

    first, second = weights(0)
    for finish in (lambda layer: None, convert):
        session = Session(model := linears(), finish, duplicates="update")
        with pytest.raises(LoaderError, match="finished"), session:  # noqa: PT012
            for name, tensor in session.pairs([("a", first), ("b", first), ("a", second)]):
                model[name].weight.data.copy_(tensor)


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


# -- writes that come once more, and memory that holds nothing --------------------------------------------------------


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


def test_what_adds_to_memory_that_was_given_back_reads_it(direct: bool) -> None:
    weight = weights(0)[0]
    with pytest.raises(LoaderError, match="before it is written"), Session(model := linears("a"), direct=direct):
        model["a"].weight.data.index_put_((torch.arange(64),), weight, accumulate=True)
    with (  # noqa: PT012, RUF100
        pytest.warns(UserWarning, match="resized"),
        pytest.raises(LoaderError, match="torch would resize it"),
        Session(model := linears("a"), direct=direct),
    ):
        torch.add(weight[:1], 1, out=model["a"].weight.data)


def test_a_quantized_weight_that_is_registered_transposed_is_refused() -> None:
    with pytest.raises(LoaderError, match="another shape or order of axes"), Session(model := linears("a")):
        model["a"].weight = nn.Parameter(model["a"].weight.data.t(), requires_grad=False)


# -- whose values they are --------------------------------------------------------------------------------------------


def through_staging(model: Any, session: Session, pairs: Pairs) -> None:
    """Each tensor by way of memory that the loader uses again."""
    staging = torch.empty(64, 64, dtype=torch.bfloat16)
    for name, tensor in session.pairs(pairs):
        staging.copy_(tensor)
        model["a"].weight.data[slice(0, 64) if name == "q" else slice(64, 128)].copy_(staging)


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_staging_memory_that_is_used_again_keeps_tensors_apart(scheme: str, direct: bool) -> None:
    q, k = weights(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)})
    with Session(model, scheme, direct=direct) as session:
        through_staging(model, session, [("q", q), ("k", k)])
    expected = schemes.quantize(torch.cat([q, k]), scheme, [64, 64])
    assert same_bytes(model["a"].weight.data, expected[0])
    assert same_bytes(model["a"].weight_scale.data, expected[1])
    model = nn.ModuleDict({"a": nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)})
    with pytest.raises(CoverageError, match="two tensors|Two tensors|written twice"), Session(model, scheme) as session:  # noqa: RUF043
        through_staging(model, session, [("q", q), ("k", k), ("k", k * 3)])


def test_staging_in_a_buffer_of_the_model() -> None:
    weight = weights(0)[0]
    model = linears("a")
    model["a"].register_buffer("staging", torch.zeros(32, 64, dtype=torch.bfloat16))
    with Session(model) as session:
        for _, tensor in session.pairs([("w", weight)]):
            for rows in (slice(0, 32), slice(32, 64)):
                model["a"].staging.copy_(tensor[rows])
                model["a"].weight.data[rows].copy_(model["a"].staging)
    assert_channel(model["a"], weight)


@pytest.mark.parametrize(
    "join", [lambda q, k: torch.stack([q, k]).flatten(0, 1), lambda q, k: torch.cat([q, q, k])[64:]]
)
def test_tensors_that_are_joined_and_seen_otherwise_keep_their_scales(join: Callable[..., Tensor]) -> None:
    q, k = weights(0)
    model = nn.ModuleDict({"a": nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)})
    with Session(model, "fp8_tensor") as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        model["a"].weight.data.copy_(join(pairs["q"], pairs["k"]))
    assert model["a"].weight_scale.numel() == 2


def test_a_late_parameter_that_is_never_loaded_is_named() -> None:
    model = linears("a")
    with pytest.raises(CoverageError, match="a.bias"), Session(model) as session:  # noqa: PT012, RUF043
        for _, tensor in session.pairs([("a", weights(0)[0])]):
            model["a"].weight.data.copy_(tensor)
            model["a"].bias = nn.Parameter(torch.empty(64), requires_grad=False)


def by_slice(target: Tensor, start: int, tensor: Tensor) -> None:
    target[start : start + 64].copy_(tensor)


def by_index(target: Tensor, start: int, tensor: Tensor) -> None:
    target[torch.arange(start, start + 64)] = tensor


@pytest.mark.parametrize(("write", "shared"), [(by_slice, True), (by_index, False)], ids=["storage", "index"])
def test_tensors_that_a_loader_collects_keep_their_scales(write: Callable[..., None], shared: bool) -> None:
    q, k = weights(0)
    both = torch.cat([q, k])
    given = [("q", both[:64]), ("k", both[64:])] if shared else [("q", q), ("k", k)]
    model = nn.ModuleDict({"a": nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)})
    with Session(model, "fp8_tensor", direct=False) as session:
        pairs = dict(session.pairs(given))
        write(model["a"].weight.data, 0, pairs["q"])
        write(model["a"].weight.data, 64, pairs["k"])
    assert model["a"].weight_scale.numel() == 2


def joined_model() -> Any:
    return nn.ModuleDict({"a": nn.Linear(64, 128, bias=False, dtype=torch.bfloat16)})


def bucket(q: Tensor, k: Tensor) -> Tensor:
    """Both in one flat buffer, as trainers send them, behind something else."""
    return torch.cat([torch.ones(8, dtype=q.dtype), q.flatten(), k.flatten()])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "columns, then transposed": lambda w, q, k: w.copy_(torch.cat([q.t(), k.t()], 1).t()),
    "a cat of cats": lambda w, q, k: w.copy_(torch.cat([torch.cat([q[:32], q[32:]]), torch.cat([k[:8], k[8:]])])),
    "quarters of a cat": lambda w, q, k: [w[i : i + 32].copy_(torch.cat([q, k])[i : i + 32]) for i in (96, 0, 64, 32)],
    "cast and cloned": lambda w, q, k: w.copy_(torch.cat([q, k])[:].clone().float().view(2, 64, 64).flatten(0, 1)),
    "computed by element": lambda w, q, k: w.copy_(torch.stack([q, k]).mul(1).flatten(0, 1)),
    "halves of staging": lambda w, q, k: staged(w, [q, k]),
    "index_put_": lambda w, q, k: w.index_put_(
        (torch.arange(64).repeat(2) + 64 * (torch.arange(128) < 64),), torch.cat([k, q])
    ),
    "flipped": lambda w, q, k: w.copy_(torch.cat([k.flip(0), q.flip(0)]).flip(0)),
    "index_copy_": lambda w, q, k: w.index_copy_(0, torch.arange(128), torch.stack([q, k]).flatten(0, 1)),
}


def staged(weight: Tensor, tensors: list[Tensor]) -> None:
    staging = torch.empty(128, 64, dtype=torch.bfloat16)
    for at, tensor in enumerate(tensors):
        staging[64 * at : 64 * at + 64].copy_(tensor)
    weight.copy_(staging)


def load_joined(way: str, scheme: str, direct: bool) -> Any:
    q, k = weights(0)
    model = joined_model()
    with Session(model, scheme, direct=direct) as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        WAYS[way](model["a"].weight.data, pairs["q"], pairs["k"])
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_joined_tensors_are_quantized_each_as_if_alone(way: str, scheme: str, direct: bool) -> None:
    q, k = weights(0)
    refused = {"flipped": "values of q, k.*Copy each"}
    if direct:  # of either tensor, the second half comes when the first is quantized
        refused["quarters of a cat"] = "direct=False"
    if way in refused:
        with pytest.raises(LoaderError, match=rf"a\.weight.*{refused[way]}"):
            load_joined(way, scheme, direct)
        scheme = "fp8_channel"
    model = load_joined(way, scheme, direct)
    expected = schemes.quantize(torch.cat([q, k]), scheme, [64, 64])
    assert same_bytes(model["a"].weight.data, expected[0])
    assert same_bytes(model["a"].weight_scale.data, expected[1])


@pytest.mark.parametrize("write", [by_slice, by_index])
def test_tensors_of_one_bucket_keep_their_scales(write: Callable[..., None]) -> None:
    q, k = weights(0)
    flat, model = bucket(q, k), joined_model()
    given = [("q", flat[8 : 8 + 4096].view(64, 64)), ("k", flat[8 + 4096 :].view(64, 64))]
    with Session(model, "fp8_block", direct=False) as session:
        pairs = dict(session.pairs(given))
        write(model["a"].weight.data, 64, pairs["k"])
        write(model["a"].weight.data, 0, pairs["q"])
    assert same_bytes(model["a"].weight_scale.data, schemes.quantize(torch.cat([q, k]), "fp8_block", [64, 64])[1])


def test_a_bucket_that_is_filled_again_hides_no_second_tensor() -> None:
    q, k = weights(0)
    buffer, model = torch.empty(64, 64, dtype=torch.bfloat16), joined_model()

    def received() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (("q", q), ("k", k), ("k", k * 3)):
            yield name, buffer.copy_(tensor)

    with pytest.raises(CoverageError, match="k"), Session(model, "fp8_channel") as session:  # noqa: PT012
        for name, tensor in session.pairs(received()):
            model["a"].weight.data[0 if name == "q" else 64 :][:64].copy_(tensor)


def test_a_sum_of_two_tensors_is_no_join() -> None:
    """A loader may compute one parameter of several tensors; those of a cat are followed through."""
    q, k = weights(0)
    model = linears("a")
    with Session(model, "fp8_tensor") as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        model["a"].weight.data.copy_(pairs["q"] + pairs["k"])
    assert same_bytes(model["a"].weight.data, schemes.quantize(q + k, "fp8_tensor")[0])


# -- memory that nothing was written to -------------------------------------------------------------------------------


def test_a_half_that_never_comes_into_staging_is_found() -> None:
    with pytest.raises(LoaderError, match=r"a\.weight.*nothing was written to"), Session(joined_model()) as session:  # noqa: PT012
        pairs = dict(session.pairs([("q", weights(0)[0])]))
        staged(session.model["a"].weight.data, [pairs["q"]])


def test_memory_put_in_a_parameters_place_must_hold_values() -> None:
    with pytest.raises(LoaderError, match=r"a\.weight.*nothing was written to"), Session(model := linears("a")):
        model["a"].weight = nn.Parameter(torch.empty(64, 64, dtype=torch.bfloat16), requires_grad=False)


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


def test_a_late_parameter_of_which_half_is_loaded_is_named() -> None:
    with pytest.raises(CoverageError, match=r"a\.bias.*\[32:64\]"), Session(model := linears("a")) as session:  # noqa: PT012
        for _, tensor in session.pairs([("a", weights(0)[0])]):
            model["a"].bias = nn.Parameter(torch.empty(64), requires_grad=False)
            model["a"].bias.data[:32].copy_(torch.ones(32))
            model["a"].weight.data.copy_(tensor)


@pytest.mark.parametrize(
    "use", [lambda session: session.load(DENSE), lambda session: session.dummy()], ids=["load", "dummy"]
)
def test_a_session_that_was_not_entered_loads_nothing(use: Callable[[Session], None]) -> None:
    session = Session(Model(SMALL), "fp8_channel")
    with pytest.raises(LoaderError, match="load within `with session:`"):
        use(session)
    with session:  # and is as good as before
        session.model.load_weights(iter(DENSE))
    with pytest.raises(LoaderError, match="load within `with session:`"):
        use(session)


@pytest.mark.parametrize("dtype", [torch.int8, schemes.FP8], ids=str)
def test_numbers_without_their_scales_are_no_weights(dtype: torch.dtype, direct: bool) -> None:
    numbers = torch.ones(64, 64).to(dtype)

    def load() -> None:
        with Session(model := linears("a"), direct=direct) as session:
            for _, tensor in session.pairs([("a", numbers)]):
                model["a"].weight.data.copy_(tensor)

    with pytest.raises(LoaderError, match=r"a\.weight.*mean nothing without their scales"):
        load()


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


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
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
            q, scale = schemes.quantize(halves.flatten(0, 1), scheme)
            assert same_bytes(model[0].weight.data, q)
            assert same_bytes(model[0].weight_scale.data, scale)
