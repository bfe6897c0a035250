"""Models that load themselves onto a CUDA device, and are updated there: the bytes are the CPU's, graphs stay valid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers import same_bytes, write_checkpoint
from helpers.engine import Model, Shape, checkpoint
from octavo.errors import UpdateError, WeightError
from octavo.numerics import schemes
from octavo.running.modules import QuantizedLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPE = Shape(hidden=256, inner=320, experts=4)
SCHEMES = list(schemes.SCHEMES)


def loaded(scheme: str, device: str, direct: bool = True, moe: bool = True) -> tuple[Model, Any]:
    with torch.device("meta"):
        model = Model(SHAPE, moe=moe)
    session = octavo.layerwise(model, scheme, device, direct=direct)
    with session:
        model.load_weights(checkpoint(SHAPE, moe=moe).items())
    return model, session


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_loads_itself_onto_a_gpu_has_the_bytes_of_one_on_a_cpu(scheme: str, direct: bool) -> None:
    here, _ = loaded(scheme, "cuda", direct)
    there, _ = loaded(scheme, "cpu")
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert a.is_cuda, name
        assert same_bytes(a.data.cpu(), b.data), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_recorded_plan_streams_onto_a_gpu(scheme: str, tmp_path: Any) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(SHAPE, moe=True))
    with torch.device("meta"):
        here = Model(SHAPE, moe=True)
    session = octavo.layerwise(here, scheme, "cuda")
    session.stream(session.record(folder))
    there, _ = loaded(scheme, "cpu")
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert a.is_cuda, name
        assert same_bytes(a.data.cpu(), b.data), name


@pytest.mark.parametrize("where", ["cpu", "pinned", "cuda"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_update_keeps_captured_graphs_valid(scheme: str, where: str) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)})
    weight = torch.randn(256, 512).bfloat16()
    with octavo.layerwise(model, scheme, "cuda") as session:
        session.load([("a.weight", weight)])
    layer = model["a"]
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        new: Tensor = weight.flip(0).contiguous() * 3
        source = new.pin_memory() if where == "pinned" else new.to(where)
        octavo.update(model, [("a.weight", source)])
        graph.replay()
        assert torch.equal(out, layer(x))
    q, scale = schemes.quantize(new, scheme)
    assert same_bytes(layer.weight.data.cpu(), q)
    assert same_bytes(layer.weight_scale.data.cpu(), scale)


@pytest.mark.parametrize("at_rest", [True, False], ids=["list", "iterator"])
@pytest.mark.parametrize("where", ["cpu", "pinned", "cuda", "mixed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batches_of_an_update_have_the_bytes_of_a_cpu(scheme: str, where: str, at_rest: bool) -> None:
    """Many batches; an iterator uses the memory of its tensors again."""
    names = [f"{number}.weight" for number in range(40)]
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16) for _ in names))
    with octavo.layerwise(model, scheme, "cuda") as session:
        session.load([(name, torch.ones(128, 256).bfloat16()) for name in names])
    news = {name: torch.randn(128, 256).bfloat16() for name in names}
    places = ["cpu", "pinned", "cuda"] if where == "mixed" else [where]

    def placed(tensor: Tensor, place: str) -> Tensor:
        return tensor.pin_memory() if place == "pinned" else tensor.to(place)

    def reusing() -> Iterator[tuple[str, Tensor]]:
        held = {place: placed(torch.zeros(128, 256).bfloat16(), place) for place in places}
        for (name, tensor), place in zip(news.items(), itertools.cycle(places), strict=False):
            yield name, held[place].copy_(tensor)
            held[place].fill_(torch.nan)

    given = [(n, placed(t, place)) for (n, t), place in zip(news.items(), itertools.cycle(places), strict=False)]
    octavo.update(model, given if at_rest else reusing(), staging_bytes=1 << 20)
    for layer, new in zip(model, news.values(), strict=True):
        q, scale = schemes.quantize(new, scheme)
        assert same_bytes(layer.weight.data.cpu(), q)
        assert same_bytes(layer.weight_scale.data.cpu(), scale)


def test_tensors_larger_than_staging_go_in_tiles() -> None:
    for scheme in SCHEMES:
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(1000, 3000, bias=False, dtype=torch.bfloat16)})
        weight = torch.randn(3000, 1000).bfloat16()
        with octavo.layerwise(model, scheme, "cuda", staging_bytes=1 << 20) as session:
            session.load([("a.weight", weight)])
        q, scale = schemes.quantize(weight, scheme)
        assert same_bytes(model["a"].weight.data.cpu(), q)
        assert same_bytes(model["a"].weight_scale.data.cpu(), scale)


def test_a_weight_that_is_not_finite_is_named_at_the_end() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 8, bias=False), "b": torch.nn.Linear(64, 8, bias=False)})
    good, bad = torch.ones(8, 64), torch.full((8, 64), torch.inf)
    session = octavo.layerwise(model, "fp8_channel", "cuda")
    with session:
        session.load([("a.weight", good), ("b.weight", good)])
    with pytest.raises(UpdateError, match=r"b.weight.*not finite") as caught:
        octavo.update(model, [("a.weight", good), ("b.weight", bad)])
    assert caught.value.new == ("a",)
    assert caught.value.torn == ("b",)
    fresh = torch.nn.ModuleDict({"b": torch.nn.Linear(64, 8, bias=False)})
    with pytest.raises(WeightError, match=r"b.weight.*not finite"), octavo.layerwise(fresh, "fp8_channel", "cuda") as s:
        s.load([("b.weight", bad)])
    assert fresh["b"].weight.is_meta
