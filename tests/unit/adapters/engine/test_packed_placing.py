"""What is streamed into parameters of packed numbers, and of their scales, is what a loader would have put there."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from helpers.vllm_toys import Toy, empty
from octavo import Recipe
from octavo.adapters.engine.cuts import Grid
from octavo.adapters.engine.given import given_for
from octavo.adapters.engine.loading import Loading
from octavo.adapters.engine.survey import Surveyor
from octavo.adapters.vllm.options import Options
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.conversion.iterate import iterate
from octavo.elements.dry_run import trace
from octavo.numerics import schemes
from octavo.numerics.schemes import FP8
from octavo.planning.budget import Budget
from octavo.planning.plan import plan_checkpoint
from octavo.streaming.meter import Stages
from octavo.streaming.sinks import ParameterSink
from octavo.streaming.stream import Stream

LAYOUT = formats.get("compressed-tensors")
DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class Experts(nn.Module):
    """Those of the last of ``ranks``: rows of gate and up, and columns of down."""

    def __init__(self, ranks=1, experts=3, rows=64, cols=256, scheme="nvfp4"):
        super().__init__()
        self.rank, mine = ranks - 1, rows // ranks
        if scheme == "int8_channel":
            self.w13_weight_packed = empty(experts, 2 * mine, cols // 4, dtype=torch.int32)
            self.w13_weight_scale = empty(experts, 2 * mine, 1)
            self.w13_weight_shape = empty(experts, 2)
            self.w2_weight_packed = empty(experts, cols, mine // 4, dtype=torch.int32)
            self.w2_weight_scale = empty(experts, cols, 1)
            self.w2_weight_shape = empty(experts, 2)
            return
        self.w13_weight_packed = empty(experts, 2 * mine, cols // 2, dtype=torch.uint8)
        self.w13_weight_scale = empty(experts, 2 * mine, cols // 16, dtype=FP8)
        self.w13_weight_global_scale = empty(experts, 2, dtype=torch.float32)
        self.w2_weight_packed = empty(experts, cols, mine // 2, dtype=torch.uint8)
        self.w2_weight_scale = empty(experts, cols, mine // 16, dtype=FP8)
        self.w2_weight_global_scale = empty(experts, dtype=torch.float32)

    def load_weights(self, weights):
        for name, weight in weights:
            expert, layer, kind = name.split(".")
            target = getattr(self, f"{'w2' if layer == 'down_proj' else 'w13'}_{kind}").data[int(expert)]
            if kind == "weight_shape":
                target.copy_(weight)
            elif kind == "weight_global_scale":
                (target if layer == "down_proj" else target[int(layer == "up_proj")]).copy_(weight[0])
            elif layer == "down_proj":
                part = weight.narrow(1, self.rank * target.shape[1], target.shape[1]) if weight.shape[1] > 1 else weight
                target.copy_(part)
            else:
                rows = target.shape[0] // 2
                target.narrow(0, rows * (layer == "up_proj"), rows).copy_(weight.narrow(0, self.rank * rows, rows))


@pytest.mark.parametrize(("cols", "codes", "scales"), [(0, 0, 0), (8, 4, 0), (24, 12, 1), (32, 16, 2)])
def test_a_group_is_eight_bytes_however_many_columns_there_are(cols, codes, scales):
    assert Grid.of(schemes.get("nvfp4"), (3, cols)) == ((3, codes), (1, 8), (3, scales))


def shape_of(name):
    return (256, 64) if "down_proj" in name else (64, 256)


@pytest.fixture
def experts(tmp_path):
    """Gate after up in the files, which their parameters have the other way round; one global scale of its own."""
    names = [f"{expert}.{layer}_proj.weight" for expert in (1, 0, 2) for layer in ("up", "gate", "down")]
    tensors = {name: random_weights(shape_of(name), torch.bfloat16, seed) for seed, name in enumerate(names)}
    tensors["2.up_proj.weight"][5, 7] = 60.0
    return Checkpoint.open(write_checkpoint(tmp_path, tensors, shards=2))


def streamed(model, reference, checkpoint, lanes=0, scheme="nvfp4"):
    """The places of a model that is streamed into, while a reference is given all by its loader."""
    plan = plan_checkpoint(checkpoint, Recipe(scheme), 8 << 20)
    reference.load_weights(iterate(checkpoint, plan, LAYOUT))
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0x5A)
    places = Surveyor(model, model.load_weights, plan, LAYOUT).run().places
    budget = Budget.fit(places.direct.placements, plan.staging_bytes, 2)
    budget = dataclasses.replace(budget, lanes=lanes, block_bytes=1 << 20)
    Stream(checkpoint, places.direct, ParameterSink(places.storages), budget=budget).run()
    model.load_weights(iterate(checkpoint, places.rest, LAYOUT))
    for (name, mine), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert same_bytes(mine, wanted), name
    return places


@pytest.mark.parametrize("lanes", [0, 2])
def test_all_experts_of_a_layer_are_two_placements(lanes, experts):
    places = streamed(Experts(), Experts(), experts, lanes)
    assert not places.rest.placements
    found = {(p.name, p.shape, p.parts) for p in places.direct.placements}
    assert found == {
        ("w13_weight_packed (6 tensors)", (3, 128, 256), (64, 64)),
        ("w2_weight_packed (3 tensors)", (3, 256, 64), (256,)),
    }


@pytest.mark.parametrize("lanes", [0, 2])
def test_columns_of_a_rank_are_streamed_and_rows_go_through_the_loader(lanes, experts):
    places = streamed(Experts(ranks=2), Experts(ranks=2), experts, lanes)
    assert [(p.name, p.columns) for p in places.direct.placements] == [("w2_weight_packed (3 tensors)", (32, 64))]
    assert len(places.rest.placements) == 6  # the scale over a matrix is that of all its rows


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_four_numbers_in_one_are_streamed_whichever_rows_and_columns_a_rank_has(ranks, lanes, experts):
    made = {"ranks": ranks, "scheme": "int8_channel"}
    places = streamed(Experts(**made), Experts(**made), experts, lanes, "int8_channel")
    assert not places.rest.placements
    assert [p.name for p in places.direct.placements] == [
        "w13_weight_packed (6 tensors)",
        "w2_weight_packed (3 tensors)",
    ]


@pytest.mark.parametrize(("scheme", "held"), [("nvfp4", "nvfp4"), ("int8_channel", "int8_packed")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_layers_are_streamed(ranks, scheme, held, tmp_path):
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(DENSE)}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    tensors["up_proj.weight"][200, 3] = 60.0
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    places = streamed(Toy(held, ranks), Toy(held, ranks), checkpoint, scheme=scheme)
    assert len(places.rest.placements) == (2 if scheme == "nvfp4" and ranks == 2 else 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_int8_that_is_in_a_file_already_is_put_into_words_as_it_is(ranks, tmp_path):
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(DENSE)}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    source = write_checkpoint(tmp_path / "bf16", tensors, config={"model_type": "toy"})
    octavo.convert(source, tmp_path / "int8", "int8_channel")
    checkpoint = Checkpoint.open(tmp_path / "int8").decoded()
    mine, again = Toy("int8_packed", ranks), Toy("int8_packed", ranks)
    places = streamed(mine, Toy("int8_packed", ranks), checkpoint, scheme="int8_channel")
    assert not places.rest.placements
    streamed(again, Toy("int8_packed", ranks), Checkpoint.open(source), scheme="int8_channel")
    assert all(map(same_bytes, mine.parameters(), again.parameters()))


def test_the_shape_of_joined_matrices_is_that_of_the_last(tmp_path):
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(DENSE)}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    plan = plan_checkpoint(Checkpoint.open(write_checkpoint(tmp_path, tensors)), Recipe("int8_channel"), 8 << 20)
    model = Toy("int8_packed")
    found = Surveyor(model, model.load_weights, plan, LAYOUT).run()
    shapes = [name for name in found.fillers["gate_up_proj"] if name.endswith("_shape")]
    assert shapes == ["up_proj.weight_shape"]
    assert sorted(constant.target for constant in found.constants) == [
        *["down_proj.weight_shape"] * 2,
        *["gate_up_proj.weight_shape"] * 2,
    ]
    assert model.gate_up_proj.weight_shape.tolist() == [256, 256]


def test_rows_that_are_no_whole_words_stay_with_the_reason(tmp_path):
    tensors = {
        "a.weight": random_weights((8, 6), torch.bfloat16, 0),
        "b.weight": random_weights((8, 8), torch.bfloat16, 1),
    }
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    options = Options.parse({"scheme": "int8_channel", "format": "compressed-tensors", "remember": False})
    loading = Loading("vLLM", checkpoint, options, options.layout, torch.device("cpu"), logging.getLogger(), Stages())
    assert [p.name for p in loading.plan.quantized] == ["b.weight"]
    assert [p.reason for p in loading.plan.kept] == ["6 columns: readers of packed int8 want a multiple of 4"]


def test_a_shape_that_a_loader_computes_with_goes_through_it(tmp_path):
    class Doubling(Toy):
        def load_weights(self, weights):
            super().load_weights((name, tensor * 2 if name.endswith("_shape") else tensor) for name, tensor in weights)

    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(DENSE)}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    model = Doubling("int8_packed")
    streamed(model, Doubling("int8_packed"), checkpoint, scheme="int8_channel")
    assert model.down_proj.weight_shape.tolist() == [512, 512]


class Turned(Experts):
    """Whose words lie with rows for columns, and scales in a row, as vLLM 0.24 has them for Marlin.

    ``of_scales``: whether scales are turned with them.
    """

    def __init__(self, ranks=1, of_scales=True):
        super().__init__(ranks, scheme="int8_channel")
        self.of_scales = of_scales
        for name in ("w13_weight_packed", "w2_weight_packed", "w13_weight_scale", "w2_weight_scale"):
            experts, rows, cols = getattr(self, name).shape
            if of_scales or not name.endswith("scale"):
                setattr(self, name, empty(experts, cols, rows, dtype=getattr(self, name).dtype))

    def load_weights(self, weights):
        for name, weight in weights:
            expert, layer, kind = name.split(".")
            target = getattr(self, f"{'w2' if layer == 'down_proj' else 'w13'}_{kind}").data[int(expert)]
            if kind == "weight_shape":
                target.copy_(weight)
                continue
            axis = int(self.of_scales or kind != "weight_scale")  # of rows
            weight = weight.t().contiguous() if axis else weight
            if layer == "down_proj":
                mine = target.shape[1 - axis]
                cut = mine < weight.shape[1 - axis]
                target.copy_(weight.narrow(1 - axis, self.rank * mine, mine) if cut else weight)
            else:
                mine = target.shape[axis] // 2
                part = weight.narrow(axis, self.rank * mine, mine)
                target.narrow(axis, mine * (layer == "up_proj"), mine).copy_(part)


@pytest.mark.parametrize("ranks", [1, 2])
def test_words_that_a_loader_turns_are_left_to_it(ranks, experts):
    places = streamed(Turned(ranks), Turned(ranks), experts, scheme="int8_channel")
    assert not places.direct.placements
    assert len(places.rest.quantized) == 9


def test_words_that_are_turned_without_their_scales_are_refused(experts):
    model, plan = Turned(of_scales=False), plan_checkpoint(experts, Recipe("int8_channel"))
    given = given_for(LAYOUT, "int8_channel")
    wanted = {placement.name: placement for placement in plan.quantized}
    sources = [source for placement in plan.quantized for source in given.sources(placement)]
    seen = trace(model, model.load_weights, sources)
    assert seen.failed is None
    problems = {given.misfit(placement, seen.by_source, "vLLM") for placement in wanted.values()}
    assert problems == {"vLLM's loader does not cut its scale as it cuts the weight"}
