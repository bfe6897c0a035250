"""What is streamed into a model's own memory is what its loader would have put there."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest
import torch

from helpers import random_weights, same_bytes, write_checkpoint
from helpers.vllm_toys import Experts, Stacked, Toy, stacks_of
from octavo import Recipe
from octavo.adapters.engine.survey import Surveyor
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.conversion.iterate import iterate
from octavo.errors import WeightError
from octavo.numerics import schemes
from octavo.planning.budget import Budget
from octavo.planning.plan import plan_checkpoint
from octavo.planning.stacks import NAMINGS, find_experts
from octavo.streaming.sinks import ParameterSink
from octavo.streaming.stream import Stream

LAYOUT = formats.get("compressed-tensors")


@pytest.fixture
def source(tmp_path):
    shapes = {"gate_proj.weight": (256, 256), "up_proj.weight": (256, 256), "down_proj.weight": (256, 256)}
    tensors = {name: random_weights(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    return tensors, Checkpoint.open(write_checkpoint(tmp_path / "bf16", tensors))


def by_loader(model, tensors, scheme):
    """The model's loader, given whole tensors quantized by definition."""
    pairs = []
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            q, scale = schemes.quantize(tensor, scheme)
            pairs += [(name, q), (name + "_scale", scale)]
        else:
            pairs.append((name, tensor))
    model.load_weights(pairs)


def budget_of(plan, lanes):
    """In blocks, as on an accelerator, or without lanes as on a CPU."""
    return dataclasses.replace(Budget.fit(plan.placements, plan.staging_bytes, 2), lanes=lanes, block_bytes=1 << 20)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_streamed_and_loaded_models_are_equal(scheme, ranks, source):
    tensors, checkpoint = source
    reference, model = Toy(scheme, ranks), Toy(scheme, ranks)
    by_loader(reference, tensors, scheme)
    for parameter in model.parameters():
        parameter.view(torch.uint8).fill_(0x5A)
    plan = plan_checkpoint(checkpoint, Recipe(scheme), 1 << 20)
    places = Surveyor(model, model.load_weights, plan, LAYOUT).run().places
    tally = Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    assert not places.rest.placements
    # a rank's rows are read, and no others; where it has columns, all of the row, whose scale that of all of it is
    rows, columns = tensors["gate_proj.weight"].nbytes * 2 // ranks, tensors["down_proj.weight"].nbytes
    assert tally.read_bytes == places.direct.source_bytes == rows + columns + tensors["norm"].nbytes
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name


def test_a_parameter_that_a_loader_computes_is_left_to_it(source):
    class Shifting(Toy):
        def load_weights(self, weights):
            super().load_weights(weights)
            self.norm.data.add_(1)

    _, checkpoint = source
    model = Shifting()
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe()), LAYOUT).run().places
    assert [placement.name for placement in places.rest.placements] == ["norm"]


def test_what_is_read_is_what_was_planned_though_a_loader_computes_some_of_it(source):
    class Adding(Toy):
        def load_weights(self, weights):
            super().load_weights((name, weight + 1 if name == "norm" else weight) for name, weight in weights)

    tensors, checkpoint = source
    model, reference = Adding(ranks=2), Adding(ranks=2)
    by_loader(reference, tensors, "fp8_channel")
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe()), LAYOUT).run().places
    assert [placement.name for placement in places.rest.placements] == ["norm"]
    tally = Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    model.load_weights(iterate(checkpoint, places.rest, LAYOUT, tally=tally))
    assert tally.read_bytes == places.direct.source_bytes + places.rest.source_bytes
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name


def test_a_tensor_that_goes_to_two_places_is_streamed_to_both(source):
    class Twice(Toy):
        """The output head is the norm once more, to have something that is needed twice."""

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Parameter(torch.zeros(256, dtype=torch.bfloat16))

        def load_weights(self, weights):
            for name, weight in weights:
                super().load_weights([(name, weight)])
                if name == "norm":
                    self.head.data.copy_(weight)

    tensors, checkpoint = source
    model = Twice()
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe()), LAYOUT).run().places
    Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    assert torch.equal(model.head, tensors["norm"].bfloat16())
    assert torch.equal(model.norm, model.head)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_what_fills_one_parameter_is_one_placement_with_the_same_bytes(scheme, lanes, tmp_path):
    names = [f"{expert}.{half}_proj.weight" for expert in (1, 0, 2) for half in ("up", "gate")]
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(names)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors, shards=2))
    model, reference = Experts(scheme), Experts(scheme)
    by_loader(reference, tensors, scheme)
    model.w13.data.view(torch.uint8).fill_(0x5A)
    plan = plan_checkpoint(checkpoint, Recipe(scheme), 8 << 20)
    places = Surveyor(model, model.load_weights, plan, LAYOUT).run().places
    (placement,) = places.direct.placements
    assert (placement.name, len(placement.pieces), placement.parts) == ("w13 (6 tensors)", 6, (256, 256))
    assert not places.rest.placements
    assert places.direct.source_bytes == plan.source_bytes
    budget = budget_of(places.direct, lanes)
    Stream(checkpoint, places.direct, ParameterSink(places.storages), budget=budget).run()
    assert same_bytes(model.w13, reference.w13)
    assert same_bytes(model.w13_scale, reference.w13_scale)


class Down(torch.nn.Module):
    """The last rank's columns of the down projections of all experts in one parameter, in FP8 or in bf16."""

    def __init__(self, scheme, ranks=2, experts=3):
        super().__init__()
        self.rank, width = ranks - 1, 512 // ranks
        self.w2 = torch.nn.Parameter(
            torch.empty(experts, 128, width, dtype=schemes.FP8 if scheme else torch.bfloat16), requires_grad=False
        )
        if scheme:
            cells = schemes.get(scheme).cells(128, width)
            self.w2_scale = torch.nn.Parameter(torch.empty(experts, *cells), requires_grad=False)

    def load_weights(self, weights):
        for name, weight in weights:
            expert, _, kind = name.split(".")
            target = (self.w2 if kind == "weight" else self.w2_scale).data[int(expert)]
            width = target.shape[1]
            target.copy_(weight.narrow(1, self.rank * width, width) if weight.shape[1] > width else weight)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
def test_columns_of_all_experts_are_one_placement_with_the_same_bytes(scheme, lanes, tmp_path):
    names = [f"{expert}.down_proj.weight" for expert in (1, 0, 2)]
    tensors = {name: random_weights((128, 512), torch.bfloat16, seed) for seed, name in enumerate(names)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    model, reference = Down(scheme), Down(scheme)
    if scheme:
        by_loader(reference, tensors, scheme)
    else:
        reference.load_weights(tensors.items())
    model.w2.data.view(torch.uint8).fill_(0x5A)
    plan = plan_checkpoint(checkpoint, Recipe(scheme), 8 << 20)
    places = Surveyor(model, model.load_weights, plan, LAYOUT).run().places
    assert not places.rest.placements
    # whole rows are read: a rank's part of each is a short run
    assert places.direct.source_bytes == plan.source_bytes
    if scheme:
        (placement,) = places.direct.placements
        assert (placement.name, placement.columns, placement.stored_shape) == (
            "w2 (3 tensors)",
            (256, 512),
            (3, 128, 256),
        )
    assert places.direct.final_bytes() == sum(parameter.nbytes for parameter in model.parameters())
    budget = budget_of(places.direct, lanes)
    tally = Stream(checkpoint, places.direct, ParameterSink(places.storages), budget=budget).run()
    assert tally.read_bytes == places.direct.source_bytes
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name


class Rearranging(torch.nn.Module):
    """Unquantized weights that a loader takes the other way round, some columns of, or a stack of them at once."""

    def __init__(self):
        super().__init__()
        self.turned = torch.nn.Parameter(torch.empty(40, 24, dtype=torch.bfloat16))
        self.last = torch.nn.Parameter(torch.empty(24, 20, dtype=torch.bfloat16))
        self.stack = torch.nn.Parameter(torch.empty(3, 10, 24, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.empty(3, 10, dtype=torch.float32))
        self.row = torch.nn.Parameter(torch.empty(1, 20, dtype=torch.bfloat16))

    def load_weights(self, weights):
        for name, weight in weights:
            if name == "turned":
                self.turned.data.copy_(weight.t())
            elif name in ("last", "row"):
                getattr(self, name).data.copy_(weight[:, 20:])
            elif name == "stack":  # [experts, in, out], of which a rank has some of out
                self.stack.data.copy_(weight[:, :, 10:20].transpose(1, 2))
            else:
                self.bias.data.copy_(weight[:, 10:20])


@pytest.mark.parametrize("lanes", [0, 2])
def test_what_a_loader_rearranges_without_computing_is_streamed_to_its_place(lanes, tmp_path):
    shapes = {"turned": (24, 40), "last": (24, 40), "stack": (3, 24, 30), "bias": (3, 30), "row": (1, 40)}
    tensors = {name: random_weights(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(shapes.items())}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    model, reference = Rearranging(), Rearranging()
    reference.load_weights(tensors.items())
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe(None)), LAYOUT).run().places
    assert not places.rest.placements
    budget = budget_of(places.direct, lanes)
    tally = Stream(checkpoint, places.direct, ParameterSink(places.storages), budget=budget).run()
    assert tally.read_bytes == places.direct.source_bytes
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_columns_of_a_single_row_have_the_scale_of_all_of_it(scheme, tmp_path):
    class Narrow(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, 128, dtype=schemes.FP8), requires_grad=False)
            self.weight_scale = torch.nn.Parameter(torch.empty(1, 1), requires_grad=False)

        def load_weights(self, weights):
            for name, weight in weights:
                target = getattr(self, name.rpartition(".")[2]).data
                target.copy_(weight[:, -target.shape[1] :])

    tensors = {"a.weight": random_weights((1, 512), torch.bfloat16, 0)}
    tensors["a.weight"][0, 0] = 100.0
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    model, reference = Narrow(), Narrow()
    by_loader(reference, tensors, scheme)
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe(scheme)), LAYOUT).run().places
    assert not places.rest.placements
    Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    assert same_bytes(model.weight, reference.weight)
    assert same_bytes(model.weight_scale, reference.weight_scale)


def test_weights_that_are_not_finite_are_told_by_the_names_that_vllms_ignore_takes(tmp_path):
    names = [f"{expert}.{half}_proj.weight" for expert in (0, 1, 2) for half in ("gate", "up")]
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(names)}
    tensors["1.up_proj.weight"][3, 4] = float("nan")
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    model = Experts("fp8_channel")
    places = Surveyor(model, model.load_weights, plan_checkpoint(checkpoint, Recipe()), LAYOUT).run().places
    with pytest.raises(WeightError, match=r"'1.up_proj.weight' holds nan \(at \[3, 4\]\)") as raised:
        Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    ignored = re.search(r"ignore=(\[.*\])", str(raised.value))
    kept = plan_checkpoint(checkpoint, Recipe(ignore=ast.literal_eval(ignored[1])))  # a pattern without a match raises
    assert not kept.quantized


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_matrices_go_from_their_stack_straight_to_their_places(scheme, transposed, tmp_path):
    names = [f"experts.{expert}.{half}_proj.weight" for half in ("gate", "up", "down") for expert in range(3)]
    matrices = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(names)}
    stacks = stacks_of(matrices, transposed=transposed)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, stacks))
    model, reference = Stacked(scheme), Stacked(scheme)
    by_loader(reference, matrices, scheme)
    cuts = [experts.cut(NAMINGS[0]) for experts in find_experts(checkpoint)]
    plan = plan_checkpoint(checkpoint, Recipe(scheme), 8 << 20, cuts=cuts)
    places = Surveyor(model, model.load_weights, plan, LAYOUT).run().places
    assert [placement.name for placement in places.direct.placements] == [
        "down.w13 (3 tensors)",
        "gate_up.w13 (6 tensors)",
    ]
    assert not places.rest.placements
    assert places.direct.source_bytes == sum(stack.nbytes for stack in stacks.values())
    Stream(checkpoint, places.direct, ParameterSink(places.storages)).run()
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name
