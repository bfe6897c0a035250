"""What loaders and finish functions may not do is said, even where the loader swallows the error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _layerwise import DENSE, SMALL, Pairs, linears, weights
from torch import Tensor, nn

from helpers import same_bytes
from helpers.engine import Model
from octavo.errors import CoverageError, LoaderError, WeightError
from octavo.numerics import schemes
from octavo.session import Session


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
    with pytest.raises(LoaderError, match=r"deal in codes|is quantized"), Session(model := linears("abc")) as session:  # noqa: PT012
        for name, tensor in session.pairs([("a", first), ("c", first)]):
            if name == "c":
                touch(model)
            model[name].weight.data.copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.int8, schemes.FP8], ids=str)
def test_numbers_without_their_scales_are_no_weights(dtype: torch.dtype, direct: bool) -> None:
    numbers = torch.ones(64, 64).to(dtype)

    def load() -> None:
        with Session(model := linears("a"), direct=direct) as session:
            for _, tensor in session.pairs([("a", numbers)]):
                model["a"].weight.data.copy_(tensor)

    with pytest.raises(LoaderError, match=r"a\.weight.*mean nothing without their scales"):
        load()


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

    model, values = linears("abc"), weights(0)[0]
    with pytest.raises(LoaderError, match="no kernel"), Session(model, finish):  # noqa: PT012
        with contextlib.suppress(LoaderError):
            for name in "ab":
                model[name].weight.data.copy_(values)
        for name in "bc":
            model[name].weight.data.copy_(values)
    assert model["a"].weight.is_meta


@pytest.mark.parametrize("kind", [Tensor.to_sparse, Tensor.numpy, Tensor.tolist, lambda _: None])
def test_what_is_no_dense_tensor_is_refused_by_name(kind: Callable[[Tensor], Any]) -> None:
    session = Session(linears("a"), "fp8_channel")
    with pytest.raises(LoaderError, match=r"a\.weight: dense torch tensors are taken"), session:
        session.load([("a.weight", kind(torch.ones(64, 64)))])
