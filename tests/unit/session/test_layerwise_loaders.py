"""Whatever a loader does to a parameter: it sees what it expects, and each tensor has its own scale groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import SCHEMES, random_weights, same_bytes
from helpers.layerwise import assert_quantized, one_linear
from octavo.numerics import schemes
from octavo.session import Session


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


WEIGHT = random_weights((8, 64), torch.bfloat16, 1)


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
        model = one_linear(8).to(start if start == "meta" else "cpu")
        with Session(model, scheme, "cpu", direct=direct) as session:
            for _, w in session.pairs([("a.weight", WEIGHT.clone())]):
                loader(model["a"].weight, w)
        if scheme is None:
            assert same_bytes(model["a"].weight.data, WEIGHT)
        else:
            assert_quantized(model["a"], WEIGHT, scheme)
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


# -- several tensors in one parameter ---------------------------------------------------------------------------------


def _added(place: Tensor, values: Tensor) -> None:
    place.zero_()
    place.add_(values)


def _masked(place: Tensor, values: Tensor) -> None:
    place.copy_(values)
    place.masked_fill_(values > 0.05, 0.25)


def _row_filled(place: Tensor, values: Tensor) -> None:
    place.copy_(values)
    place[3].fill_(1)


def _twice(place: Tensor, values: Tensor) -> None:
    place.copy_(-values)
    place.copy_(values)


def _partly_twice(place: Tensor, values: Tensor) -> None:
    place.copy_(values)
    place[:10].copy_(values[10:20])


#: each writes over a part of what it has copied
OVERWRITING = [_masked, _row_filled, _partly_twice]
#: each writes to a view of a parameter otherwise than by a copy
COMPUTING = [
    _added,
    _twice,
    lambda place, values: torch.mul(values, 2, out=place),
    lambda place, values: torch.cat(values.split(10), out=place),
    lambda place, values: torch._foreach_copy_([place], [values]),
]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
@pytest.mark.parametrize(
    ("write", "collecting"), [*itertools.product(COMPUTING, [True, False]), *((write, False) for write in OVERWRITING)]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_have_their_own_groups_however_they_are_written(
    scheme: str, write: Callable[[Tensor, Tensor], None], collecting: bool, direct: bool
) -> None:
    tensors = {"q": random_weights((100, 64), torch.bfloat16, 0), "k": random_weights((30, 64), torch.bfloat16, 1)}
    expected = torch.zeros(130, 64, dtype=torch.bfloat16)
    places = {"q": slice(0, 100), "k": slice(100, 130)}
    model = nn.Sequential(nn.Linear(64, 130, bias=False, dtype=torch.bfloat16))
    session = Session(model, scheme, direct=direct)
    for _ in range(2):
        with session:
            pairs = session.pairs(tensors.items())
            for name, values in list(pairs) if collecting else pairs:
                write(model[0].weight.data[places[name]], values)
        for name, values in tensors.items():
            write(expected[places[name]], values)
        q, scale = schemes.quantize(expected, scheme, (100, 30))
        assert same_bytes(model[0].weight.data, q)
        assert same_bytes(model[0].weight_scale.data, scale)
        tensors = {name: values.flip(0).contiguous() for name, values in tensors.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_that_are_joined_right_into_a_parameter_have_their_own_groups(scheme: str) -> None:
    tensors = [random_weights((rows, 64), torch.bfloat16, rows) for rows in (100, 30)]
    model = nn.Sequential(nn.Linear(64, 130, bias=False, dtype=torch.bfloat16))
    with Session(model, scheme) as session:
        torch.cat(
            [values for _, values in session.pairs((str(n), t) for n, t in enumerate(tensors))], out=model[0].weight
        )
    assert_quantized(model[0], torch.cat(tensors), scheme, (100, 30))


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
    assert_quantized(model[0], expected.flatten(0, 1), scheme, (100, 100, 100))


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
