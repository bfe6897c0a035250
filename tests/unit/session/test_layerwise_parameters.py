"""Parameters on meta or real, shared, registered late, padded or left out, and buffers: each as its model has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import SCHEMES, random_weights, same_bytes
from helpers.engine import Model, checkpoint
from helpers.layerwise import WIDE, assert_quantized, one_linear
from octavo.session import Session


def test_on_meta_or_real_a_model_gets_the_same_bytes_and_keeps_attributes() -> None:
    pairs = checkpoint(WIDE, moe=True)
    real, meta = Model(WIDE, moe=True), Model(WIDE, moe=True).to("meta")
    for block in meta.layers:  # moving to meta makes new parameters, without loaders
        for module in block.modules():
            for parameter in module.parameters(recurse=False):
                if hasattr(module, "weight_loader"):
                    parameter.weight_loader = module.weight_loader
    meta.embed_tokens.weight.weight_loader = meta.embed_tokens.weight_loader
    before = real.norm.weight
    for model in (real, meta):
        with Session(model, "fp8_channel", "cpu"):
            model.load_weights(pairs.items())
    assert real.norm.weight is before
    for (name, a), (_, b) in zip(real.named_parameters(), meta.named_parameters(), strict=True):
        assert same_bytes(a.data, b.data), name
    assert callable(meta.embed_tokens.weight.weight_loader)
    assert type(meta.embed_tokens.weight) is nn.Parameter


def test_tied_parameters_stay_one_and_every_owner_is_finished() -> None:
    with torch.device("meta"):
        a, b = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)
        model = nn.ModuleDict({"a": a, "b": b, "c": nn.LayerNorm(64)})
    model["b"].weight = model["a"].weight
    finished = []

    def finish(layer: nn.Module) -> None:
        finished.append(layer)
        assert torch.equal(layer.weight, torch.ones(layer.weight.shape))

    pairs = [(name, torch.ones(parameter.shape)) for name, parameter in model.named_parameters()]
    with Session(model, finish, "cpu") as session:
        session.load(pairs)
    assert model["a"].weight is model["b"].weight
    assert len(finished) == 3
    assert set(finished) == set(model.values())
    quantized = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.Linear(64, 8, bias=False)})
    quantized["b"].weight = quantized["a"].weight
    with Session(quantized, "fp8_channel") as session:
        session.load([("b.weight", torch.ones(8, 64))])
    assert quantized["a"].weight is quantized["b"].weight
    assert quantized["a"].weight.dtype == torch.float32
    assert session.report.kept == {"a.weight": "tied: 2 modules share it"}


def test_a_module_that_a_loader_brings_is_noted() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.Linear(64, 8, bias=False)})
    with Session(model, "fp8_channel") as session:
        model["b"] = nn.Linear(8, 4)
        model["a"].weight.data.copy_(torch.ones(8, 64))
    with session:
        session.load([("a.weight", torch.zeros(8, 64))])
    assert float(model["a"].weight.float().abs().max()) == 0
    assert session.report.notes == ["b: a module that came while loading; it stays as it came"]
    assert model["b"].weight.dtype == torch.float32


def test_slices_of_one_storage_are_loaded_where_they_are() -> None:
    flat = torch.zeros(3 * 64)
    model = nn.ModuleDict({name: nn.LayerNorm(64, bias=False) for name in "abc"})
    for index, layer in enumerate(model.values()):
        layer.weight = nn.Parameter(flat[index * 64 : (index + 1) * 64])
    values = {f"{name}.weight": torch.full((64,), float(index + 1)) for index, name in enumerate("abc")}
    with Session(model, None) as session:
        session.load(values.items())
    assert torch.equal(flat, torch.cat(list(values.values())))
    assert len(session.report.notes) == 3
    with session:
        session.load([("b.weight", torch.zeros(64))])
    assert float(flat.sum()) == 64 * 4


def test_parameters_that_share_memory_are_one() -> None:
    model = nn.ModuleDict({"a": nn.LayerNorm(64, bias=False), "b": nn.LayerNorm(64, bias=False)})
    model["b"].weight.data = model["a"].weight.data
    with Session(model, None) as session:
        session.load([("a.weight", torch.full((64,), 2.0))])
    assert torch.equal(model["b"].weight, torch.full((64,), 2.0))
    assert model["a"].weight.data_ptr() == model["b"].weight.data_ptr()


def test_an_optional_bias_may_come_after_its_layer_was_finished() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.LayerNorm(64, bias=False)})
    with Session(model, "fp8_channel", optional=["a.bias"]) as session:
        session.load([("a.weight", torch.ones(8, 64)), ("b.weight", torch.ones(64)), ("a.bias", torch.arange(8.0))])
    assert torch.equal(model["a"].bias, torch.arange(8.0))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bias_that_a_loader_registers_is_loaded_too(when: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False), "b": nn.LayerNorm(64)})
    with Session(model, "fp8_channel") as session:
        for name, tensor in session.pairs([("w", torch.ones(8, 64)), ("n", torch.ones(64)), ("m", torch.zeros(64))]):
            if name == ("w" if when == "before" else "m"):
                model["a"].bias = nn.Parameter(torch.empty(8))
                model["a"].bias.data.copy_(torch.arange(8.0))
            if name == "w":
                model["a"].weight.data.copy_(tensor)
            else:
                (model["b"].weight if name == "n" else model["b"].bias).data.copy_(tensor)
    assert torch.equal(model["a"].bias, torch.arange(8.0))
    assert model["a"].weight.dtype == torch.float8_e4m3fn
    assert session.report.kept["a.bias"] == "registered while loading"


def test_declared_padding_needs_no_tensor_and_is_zero() -> None:
    weight = random_weights((8, 64), torch.bfloat16, 1)
    for scheme in (None, *SCHEMES):
        model = one_linear(10, 96)
        model["a"].weight.padding = [((8, 0), (2, 96)), ((0, 64), (8, 32))]
        with Session(model, scheme) as session:
            for _, w in session.pairs([("a", weight)]):
                model["a"].weight.data[:8, :64].copy_(w)
        padded = torch.zeros(10, 96, dtype=torch.bfloat16)
        padded[:8, :64] = weight
        if scheme is None:
            assert same_bytes(model["a"].weight.data, padded)
        else:
            assert_quantized(model["a"], padded, scheme)
            with session:
                for _, w in session.pairs([("a", weight * 3)]):
                    model["a"].weight.data[:8, :64].copy_(w)
            assert_quantized(model["a"], padded * 3, scheme)


def test_buffers_are_loaded_where_they_are_on_meta_or_written() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(8), "b": nn.BatchNorm1d(8)})
    model["a"].to("meta")
    state = {
        f"{layer}.{name}": torch.full_like(torch.empty(tensor.shape, dtype=tensor.dtype), 3)
        for layer in "ab"
        for name, tensor in model[layer].state_dict().items()
    }
    del state["b.running_mean"]
    with Session(model, None, "cpu") as session:
        session.load(state.items())
    assert torch.equal(model["a"].running_mean, torch.full((8,), 3.0))
    assert torch.equal(model["b"].running_var, torch.full((8,), 3.0))
    assert torch.equal(model["b"].running_mean, torch.zeros(8))
    assert int(model["a"].num_batches_tracked) == 3


@pytest.mark.parametrize("scheme", [None, "fp8_channel"])
def test_a_parameter_with_holes_is_loaded(scheme: str | None) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    model["a"].weight = nn.Parameter(torch.zeros(8, 80)[:, :64])
    weight = torch.randn(8, 64)
    with Session(model, scheme, "cpu") as session:
        session.load([("a.weight", weight)])
    if scheme:
        assert_quantized(model["a"], weight, scheme)
    else:
        assert torch.equal(model["a"].weight, weight)
