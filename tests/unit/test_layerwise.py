"""Models that load themselves, on every rank: layers finished after their last write, to the definition's bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from helpers import SCHEMES, random_weights, same_bytes
from helpers.engine import Model, Rank, Shape, checkpoint, fused_parts
from octavo import schemes
from octavo.layerwise import Session
from octavo.layerwise.report import Event

RANKS = [Rank(number, size) for size in (1, 2, 4, 8) for number in {0, size // 2, size - 1}]
# sides above 128 that 128 doesn't divide
WIDE = Shape(hidden=160, inner=208, heads=8, kv_heads=4, head_dim=24, experts=4)


def loaded_plainly(model: Model, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What the model's own loader makes of the pairs, in high precision."""
    model.load_weights(pairs)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_quantized_like(model: nn.Module, reference: dict[str, Tensor], parts: dict[str, Any], scheme: str) -> None:
    found = dict(model.named_parameters())
    assert parts
    for name, tensor in reference.items():
        if name not in parts:
            assert same_bytes(found[name].data, tensor), name
            continue
        q, scale = schemes.quantize(tensor, scheme, parts[name])
        assert same_bytes(found[name].data, q), name
        assert same_bytes(found[f"{name}_scale"].data, scale), name


def assert_finished_at_once(events: list[Event]) -> None:
    """After a layer's last write comes its finish, before any other layer is touched; once, and nothing after it."""
    finished = []
    for index, event in enumerate(events):
        if event.kind == "finish":
            finished.append(event.layer)
            assert not any(later.layer == event.layer for later in events[index + 1 :])
            last_write = max((i for i, e in enumerate(events[:index]) if e.layer == event.layer), default=index)
            # whatever lies between belongs to the layer itself
            assert {e.layer for e in events[last_write:index]} <= {event.layer}
    assert len(finished) == len(set(finished))
    assert {event.layer for event in events} == set(finished)


@pytest.mark.parametrize("rank", RANKS, ids=lambda rank: f"{rank.number}of{rank.size}")
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
def test_every_rank_has_the_bytes_of_its_partition(rank: Rank, moe: bool, direct: bool) -> None:
    pairs = checkpoint(WIDE, moe=moe)
    reference = loaded_plainly(Model(WIDE, rank, moe=moe), pairs.items())
    for scheme in SCHEMES:
        model = Model(WIDE, rank, moe=moe)
        parts = dict(fused_parts(model))
        with Session(model, scheme, direct=direct) as session:
            model.load_weights(pairs.items())
        assert_quantized_like(model, reference, parts, scheme)
        assert_finished_at_once(session.events)
        materialized = {event.parameter for event in session.events if event.kind == "materialize"}
        assert materialized.isdisjoint(parts) if direct else materialized >= parts.keys()


@pytest.mark.parametrize("rank", [Rank(0, 2), Rank(1, 2)], ids=["first", "last"])
def test_expert_parallel_ranks_have_their_own_experts(rank: Rank) -> None:
    pairs = checkpoint(WIDE, moe=True)
    reference = loaded_plainly(Model(WIDE, rank, moe=True, expert_parallel=True), pairs.items())
    model = Model(WIDE, rank, moe=True, expert_parallel=True)
    parts = dict(fused_parts(model))
    with Session(model, "fp8_block") as session:
        model.load_weights(pairs.items())
    assert model.layers[0].mlp.experts.w13_weight.shape[0] == 2
    assert_quantized_like(model, reference, parts, "fp8_block")
    assert_finished_at_once(session.events)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_row_scales_of_column_parallel_layers_are_slices_of_the_whole(size: int) -> None:
    pairs = checkpoint(WIDE)
    whole, _ = schemes.quantize(pairs["layers.0.self_attn.q_proj.weight"], "fp8_channel")
    rows = whole.shape[0] // size
    for number in range(size):
        model = Model(WIDE, Rank(number, size))
        with Session(model, "fp8_channel"):
            model.load_weights(pairs.items())
        mine = model.layers[0].self_attn.qkv_proj.weight[:rows]
        assert same_bytes(mine.data, whole[number * rows : (number + 1) * rows])


@pytest.mark.parametrize("size", [2, 4])
def test_row_parallel_ranks_have_scales_of_their_own_columns(size: int) -> None:
    """What a rank does not see can't be in its scales: none is larger than that of the whole row, one is as large."""
    pairs = checkpoint(WIDE)
    name = "layers.0.self_attn.o_proj.weight"
    _, whole = schemes.quantize(pairs[name], "fp8_channel")
    found = []
    for number in range(size):
        model = Model(WIDE, Rank(number, size))
        with Session(model, "fp8_channel"):
            model.load_weights(pairs.items())
        found.append(model.layers[0].self_attn.o_proj.weight_scale.data)
    assert torch.equal(torch.stack(found).amax(0), whole)


def test_defaults_of_torch_do_not_matter() -> None:
    """Engines load under a default dtype of their own, and under a default device."""
    pairs, before = checkpoint(WIDE, moe=True), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Model(WIDE, moe=True)
            with Session(model, "fp8_channel", "cpu") as session:
                model.load_weights(pairs.items())
            with session:
                session.dummy()
    finally:
        torch.set_default_dtype(before)
    again = Model(WIDE, moe=True)
    with Session(again, "fp8_channel", "cpu") as session:
        session.dummy()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert same_bytes(a.data, b.data), name


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


class Subclass(nn.Parameter):
    """A parameter that loads itself, as vLLM's do."""

    def load_row(self, index: int, loaded: Tensor) -> None:
        data = self.data
        assert isinstance(self, Subclass)
        data[index].copy_(loaded)


@pytest.mark.parametrize("start", ["real", "meta"])
def test_loaders_see_what_they_expect(start: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            data = torch.empty(4, 64, dtype=torch.bfloat16, device=start if start == "meta" else "cpu")
            self.weight = Subclass(data, requires_grad=False)
            self.weight.note = "kept"

    model = nn.ModuleDict({"a": Layer()})
    weight = torch.randn(4, 64).bfloat16()
    with Session(model, None, "cpu", direct=False) as session:
        parameter = model["a"].weight
        assert isinstance(parameter, Subclass)
        for seen in (parameter, parameter.data, parameter.data[1:3], parameter.data.t()):
            assert seen.device == torch.device("cpu")
            assert not seen.is_meta
            assert seen.dtype == torch.bfloat16
        assert parameter.data[1:3].shape == (2, 64)
        assert torch.zeros_like(parameter.data).device.type == "cpu"
        assert torch.equal(weight.to(parameter.device), weight)
        assert torch.equal(weight.float().to(parameter), weight)
        for name, tensor in session.pairs([(str(i), weight[i]) for i in range(4)]):
            parameter.load_row(int(name), tensor.float())
    assert torch.equal(model["a"].weight, weight)
    assert type(model["a"].weight) is Subclass
    assert model["a"].weight.note == "kept"


def one_linear(out: int = 8, inputs: int = 64) -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(inputs, out, bias=False, dtype=torch.bfloat16)})


WEIGHT = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


def transposed(parameter: Tensor, w: Tensor) -> None:
    parameter.data.t().copy_(w.t())


def item_by_item(parameter: Tensor, w: Tensor) -> None:
    for row in range(0, 8, 2):
        parameter.data[row] = w[row]
        parameter[row + 1] = w[row + 1]


def viewed(parameter: Tensor, w: Tensor) -> None:
    parameter.data.view(2, 4, 64)[1].copy_(w.view(2, 4, 64)[1])
    parameter.data.view(-1)[: 4 * 64].copy_(w.reshape(-1)[: 4 * 64])


def interleaved(parameter: Tensor, w: Tensor) -> None:
    parameter.data[::2].copy_(w[::2])
    parameter.data[1::2].copy_(w[1::2])


def computed(parameter: Tensor, w: Tensor) -> None:
    parameter.data.copy_((w.float() * 2).neg().bfloat16() / -2)


def in_place_after(parameter: Tensor, w: Tensor) -> None:
    parameter.data.copy_(w.float() + 1)
    parameter.data.zero_().add_(0)
    parameter.data.copy_(-w)
    parameter.data.neg_()


def twice(parameter: Tensor, w: Tensor) -> None:
    parameter.data[:4].copy_(w[4:])
    parameter.data.copy_(w)


def begun_with_zeros(parameter: Tensor, w: Tensor) -> None:
    parameter.data.zero_()
    for columns in (slice(0, 32), slice(32, 64)):
        parameter.data[:, columns].copy_(w[:, columns])


def assigned(parameter: Tensor, w: Tensor) -> None:
    parameter.data = w.clone()


def indexed(parameter: Tensor, w: Tensor) -> None:
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    parameter.data[order] = w[order]


def by_out(parameter: Tensor, w: Tensor) -> None:
    torch.mul(w, 1.0, out=parameter.data)


def by_bits(parameter: Tensor, w: Tensor) -> None:
    parameter.data.view(torch.int16).copy_(w.view(torch.int16))


LOADERS = [
    transposed,
    item_by_item,
    viewed,
    interleaved,
    computed,
    in_place_after,
    twice,
    begun_with_zeros,
    assigned,
    indexed,
    by_out,
    by_bits,
]


@pytest.mark.parametrize("start", ["real", "meta"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_whatever_a_loader_does_the_bytes_are_right(loader: Any, direct: bool, start: str) -> None:
    for scheme in (None, *SCHEMES):
        model = one_linear().to(start if start == "meta" else "cpu")
        with Session(model, scheme, "cpu", direct=direct) as session:
            for _, w in session.pairs([("a.weight", WEIGHT.clone())]):
                loader(model["a"].weight, w)
        if scheme is None:
            assert same_bytes(model["a"].weight.data, WEIGHT)
        else:
            q, scale = schemes.quantize(WEIGHT, scheme)
            assert same_bytes(model["a"].weight.data, q), scheme
            assert same_bytes(model["a"].weight_scale.data, scale), scheme
        assert [event.layer for event in session.events if event.kind == "finish"] == ["a"]


@pytest.mark.parametrize("start", ["real", "meta"])
@pytest.mark.parametrize("way", ["load_state_dict", "assign", "new parameters"])
def test_torchs_own_ways_of_loading_work(way: str, start: str) -> None:
    source = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)).bfloat16()
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.BatchNorm1d(8)).bfloat16()
    if start == "meta":
        model.to("meta")
    with Session(model, "fp8_channel", "cpu") as session:
        if way == "new parameters":
            for name, module in model.named_children():
                for leaf, _ in list(module.named_parameters()):
                    setattr(module, leaf, nn.Parameter(state[f"{name}.{leaf}"]))
                for leaf, _ in list(module.named_buffers()):
                    getattr(module, leaf).copy_(state[f"{name}.{leaf}"])
        else:
            model.load_state_dict(state, assign=way == "assign")
    assert same_bytes(model[0].weight.data, schemes.quantize(state["0.weight"], "fp8_channel")[0])
    for name, tensor in model.state_dict().items():
        if not name.startswith("0.weight"):
            assert same_bytes(tensor, state[name]), name
    assert [event.layer for event in session.events if event.kind == "finish"] == ["0", "1", "2"]


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
    for scheme in (None, *SCHEMES):
        model = one_linear(10, 96)
        model["a"].weight.padding = [((8, 0), (2, 96)), ((0, 64), (8, 32))]
        with Session(model, scheme) as session:
            for _, w in session.pairs([("a", WEIGHT)]):
                model["a"].weight.data[:8, :64].copy_(w)
        padded = torch.zeros(10, 96, dtype=torch.bfloat16)
        padded[:8, :64] = WEIGHT
        if scheme is None:
            assert same_bytes(model["a"].weight.data, padded)
        else:
            q, scale = schemes.quantize(padded, scheme)
            assert same_bytes(model["a"].weight.data, q)
            assert same_bytes(model["a"].weight_scale.data, scale)
            with session:
                for _, w in session.pairs([("a", WEIGHT * 3)]):
                    model["a"].weight.data[:8, :64].copy_(w)
            q, scale = schemes.quantize(padded * 3, scheme)
            assert same_bytes(model["a"].weight.data, q)
            assert same_bytes(model["a"].weight_scale.data, scale)


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


def test_a_transform_renames_casts_and_drops() -> None:
    def transform(name: str, tensor: Tensor) -> Any:
        if name == "extra":
            return None
        if name == "both":
            return [("a.weight", tensor[0]), ("a.bias", tensor[1, :, 0])]
        return name.removeprefix("model."), tensor.bfloat16()

    model = nn.ModuleDict({"a": nn.Linear(64, 8, dtype=torch.bfloat16), "b": nn.LayerNorm(8, dtype=torch.bfloat16)})
    both = torch.stack([WEIGHT, WEIGHT])
    pairs = [
        ("extra", torch.ones(3)),
        ("both", both),
        ("model.b.weight", torch.ones(8)),
        ("model.b.bias", torch.ones(8)),
    ]
    with Session(model, "fp8_channel", transform=transform) as session:
        session.load(pairs)
    assert same_bytes(model["a"].weight.data, schemes.quantize(WEIGHT, "fp8_channel")[0])
    assert torch.equal(model["a"].bias, WEIGHT[:, 0])


def test_load_weights_goes_through_the_session_only_while_it_lasts() -> None:
    model = Model(WIDE)
    seen = []

    def transform(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        seen.append(name)
        return name, tensor

    with Session(model, "fp8_channel", transform=transform):
        model.load_weights(checkpoint(WIDE).items())
    assert seen == list(checkpoint(WIDE))
    assert "load_weights" not in model.__dict__


def test_dummy_weights_fill_every_layer_the_same_each_time() -> None:
    made = []
    for _ in range(2):
        model = Model(WIDE, Rank(1, 2), moe=True)
        with Session(model, "fp8_block") as session:
            session.dummy(seed=3)
        assert_finished_at_once(session.events)
        assert not any(event.kind == "materialize" and "experts" in event.layer for event in session.events)
        made.append(dict(model.named_parameters()))
    assert made[0].keys() == made[1].keys()
    assert all(same_bytes(tensor.data, made[1][name].data) for name, tensor in made[0].items())
    stack, scale = made[0]["layers.1.mlp.experts.w2_weight"], made[0]["layers.1.mlp.experts.w2_weight_scale"]
    spread = schemes.dequantize(stack.data, scale.data, "fp8_block").std()
    assert 0.019 < float(spread) < 0.021


def test_a_function_finishes_each_layer_once_and_may_replace_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    seen = []

    def finish(layer: nn.Module) -> nn.Module | None:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        seen.append(type(layer).__name__)
        return Wrapped(layer) if isinstance(layer, nn.Linear) else None

    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)).to("meta")
    with Session(model, finish, "cpu") as session:
        session.load((name, torch.ones(p.shape)) for name, p in model.named_parameters())
    assert seen == ["Linear", "LayerNorm", "Linear"]
    assert isinstance(model[0], Wrapped)
    assert torch.equal(model[0].inner.weight, torch.ones(8, 64))
    assert [layer.name for layer in session.report.layers] == ["0", "1", "3"]
    assert all(layer.finish_s >= 0 for layer in session.report.layers)


def test_the_report_says_what_each_layer_took() -> None:
    model = Model(WIDE, moe=True)
    pairs = checkpoint(WIDE, moe=True)
    with Session(model, "fp8_channel") as session:
        model.load_weights(pairs.items())
    report = session.report
    assert report.final_bytes == sum(p.nbytes for p in model.parameters())
    by_name = {layer.name: layer for layer in report.layers}
    experts = by_name["layers.0.mlp.experts"]
    assert experts.way == "direct"
    assert by_name["norm"].way == "kept"
    assert experts.loaded_bytes > experts.final_bytes
    assert report.kept["layers.0.mlp.gate.weight"] == "MoE router, kept by default"
    assert report.to_dict()["layers"]
    assert "layers.*.mlp.experts (2)" in str(report)


def test_memory_never_exceeds_the_fp8_model_and_one_layer() -> None:
    pairs = checkpoint(WIDE, moe=True)
    for direct in (True, False):
        model = Model(WIDE, moe=True)
        with Session(model, "fp8_channel", direct=direct) as session:
            model.load_weights(pairs.items())
        final, report = sum(p.nbytes for p in model.parameters()), session.report
        largest = max(layer.loaded_bytes for layer in report.layers)
        kept = max(layer.loaded_bytes for layer in report.layers if layer.loaded_bytes == layer.final_bytes)
        assert report.peak_bytes <= final + (kept if direct else largest)


def live_bytes() -> int:
    """Of all storages that Python holds tensors of."""
    found = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), Tensor) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
def test_no_more_is_alive_than_what_is_promised(direct: bool) -> None:
    """Counted from outside: every tensor that exists whenever the loader asks for another."""
    shape = Shape(hidden=512, inner=512, experts=8, layers=4)
    pairs = checkpoint(shape, moe=True)
    with torch.device("meta"):
        model = Model(shape, moe=True)
    gc.collect()  # what other tests have left must not go meanwhile
    before, alive, seen = live_bytes(), [], []

    def transform(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if len(seen) % 5 == 0:
            alive.append(live_bytes() - before)
        seen.append(name)
        return name, tensor

    with Session(model, "fp8_channel", "cpu", transform=transform, direct=direct) as session:
        model.load_weights(pairs.items())
    final = sum(parameter.nbytes for parameter in model.parameters())
    scratch = 4 << 20  # of a tile: its bits and its float32 values
    layer = 0 if direct else max(layer.loaded_bytes for layer in session.report.layers)
    assert alive[0] == 0
    assert max(alive) <= final + scratch + layer < sum(tensor.nbytes for tensor in pairs.values())


def test_a_session_says_what_is_wrong_with_its_arguments() -> None:
    model = one_linear()
    for options, text in (
        ({"finish": 3}, "finish is 3"),
        ({"finish": "fp9"}, "unknown scheme 'fp9'"),
        ({"finish": octavo.Recipe(ignore=["b"])}, "the pattern 'b' matches no tensor"),
        ({"duplicates": "maybe"}, "duplicates is 'maybe'"),
        ({"staging_bytes": 5}, "staging_bytes is 5"),
        ({"device": "nowhere"}, "device 'nowhere' can't be used"),
    ):
        with pytest.raises(octavo.OctavoError, match=text):
            Session(model, **options)
    with pytest.raises(octavo.OctavoError, match="optional pattern 'z' matches no parameter"):
        Session(model, optional=["z"]).__enter__()


def _added(place: Tensor, values: Tensor) -> None:
    place.zero_()
    place.add_(values)


def _masked(place: Tensor, values: Tensor) -> None:
    place.copy_(values)
    place.masked_fill_(values > 0.5, 0.25)


#: each writes to a view of a parameter otherwise than by a copy
COMPUTING = [
    _added,
    _masked,
    lambda place, values: torch.mul(values, 2, out=place),
    lambda place, values: torch.cat(values.split(10), out=place),
    lambda place, values: torch._foreach_copy_([place], [values]),
]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
@pytest.mark.parametrize("collecting", [True, False], ids=["collecting", "streaming"])
@pytest.mark.parametrize("write", COMPUTING)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_have_their_own_groups_however_they_are_written(
    scheme: str, write: Callable[[Tensor, Tensor], None], collecting: bool, direct: bool
) -> None:
    tensors = {"q": random_weights((100, 64), torch.bfloat16, 0), "k": random_weights((30, 64), torch.bfloat16, 1)}
    expected = torch.zeros(130, 64, dtype=torch.bfloat16)
    places = {"q": slice(0, 100), "k": slice(100, 130)}
    for name, values in tensors.items():
        write(expected[places[name]], values)
    q, scale = schemes.quantize(expected, scheme, (100, 30))
    model = nn.Sequential(nn.Linear(64, 130, bias=False, dtype=torch.bfloat16))
    session = Session(model, scheme, direct=direct)
    for _ in range(2):
        with session:
            pairs = session.pairs(tensors.items())
            for name, values in list(pairs) if collecting else pairs:
                write(model[0].weight.data[places[name]], values)
        assert same_bytes(model[0].weight.data, q)
        assert same_bytes(model[0].weight_scale.data, scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_that_are_joined_right_into_a_parameter_have_their_own_groups(scheme: str) -> None:
    tensors = [random_weights((rows, 64), torch.bfloat16, rows) for rows in (100, 30)]
    model = nn.Sequential(nn.Linear(64, 130, bias=False, dtype=torch.bfloat16))
    with Session(model, scheme) as session:
        torch.cat(
            [values for _, values in session.pairs((str(n), t) for n, t in enumerate(tensors))], out=model[0].weight
        )
    q, scale = schemes.quantize(torch.cat(tensors), scheme, (100, 30))
    assert same_bytes(model[0].weight.data, q)
    assert same_bytes(model[0].weight_scale.data, scale)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_in_staging_memory_are_not_the_tensor_before(scheme: str) -> None:
    """A loader pads every tensor in the same memory, which it sets to zero before."""
    tensors = {name: random_weights((40, 64), torch.bfloat16, seed) for seed, name in enumerate("qkv")}
    expected = torch.zeros(3, 100, 64, dtype=torch.bfloat16)
    for place, values in zip(expected, tensors.values(), strict=True):
        place[:40] = values
    model = nn.Sequential(nn.Linear(64, 300, bias=False, dtype=torch.bfloat16))
    memory = torch.empty(100, 64, dtype=torch.bfloat16)
    with Session(model, scheme, direct=False) as session:
        for place, (_, values) in zip(model[0].weight.data.split(100), session.pairs(tensors.items()), strict=False):
            memory.zero_()
            memory[:40].copy_(values)
            place.copy_(memory)
    q, scale = schemes.quantize(expected.flatten(0, 1), scheme, (100, 100, 100))
    assert same_bytes(model[0].weight.data, q)
    assert same_bytes(model[0].weight_scale.data, scale)


def test_writes_of_nothing_may_come_at_any_time() -> None:
    """A rank's share of rows may be empty, and so may a parameter; neither is a second tensor for a box."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    model[0].register_parameter("empty", nn.Parameter(torch.empty(0, 8)))
    other, weight = random_weights((8, 64), torch.bfloat16, 0), random_weights((32, 64), torch.bfloat16, 1)
    with Session(model, "fp8_channel") as session:
        place = model[0].weight.data
        for name, values in session.pairs([("weight", weight), ("other", other), ("empty", torch.empty(0, 8))]):
            if name == "empty":
                model[0].empty.data.copy_(values)
            else:
                place[: len(values) if name == "weight" else 0].copy_(values if name == "weight" else values[:0])
    assert same_bytes(model[0].weight.data, schemes.quantize(weight, "fp8_channel")[0])
