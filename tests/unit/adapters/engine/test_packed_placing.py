"""What is streamed into parameters of packed numbers, and of their scales, is what a loader would have put there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from helpers import random_weights, same_bytes, write_checkpoint
from helpers.vllm_toys import Toy, empty
from octavo import Recipe
from octavo.adapters.engine.cuts import Grid
from octavo.adapters.engine.survey import Surveyor
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.conversion.iterate import iterate
from octavo.numerics import schemes
from octavo.numerics.schemes import FP8
from octavo.planning.budget import Budget
from octavo.planning.plan import plan_checkpoint
from octavo.streaming.sinks import ParameterSink
from octavo.streaming.stream import Stream

LAYOUT = formats.get("compressed-tensors")
DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class Experts(nn.Module):
    """Those of the last of ``ranks``: rows of gate and up, and columns of down."""

    def __init__(self, ranks=1, experts=3, rows=64, cols=256):
        super().__init__()
        self.rank, mine = ranks - 1, rows // ranks
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
            if kind == "weight_global_scale":
                (target if layer == "down_proj" else target[int(layer == "up_proj")]).copy_(weight[0])
            elif layer == "down_proj":
                target.copy_(weight.narrow(1, self.rank * target.shape[1], target.shape[1]))
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


def streamed(model, reference, checkpoint, lanes=0):
    """The places of a model that is streamed into, while a reference is given all by its loader."""
    plan = plan_checkpoint(checkpoint, Recipe("nvfp4"), 8 << 20)
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_linear_layers_are_streamed(ranks, tmp_path):
    tensors = {name: random_weights((256, 256), torch.bfloat16, seed) for seed, name in enumerate(DENSE)}
    tensors["norm"] = random_weights((256,), torch.float32, 9)
    tensors["up_proj.weight"][200, 3] = 60.0
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    places = streamed(Toy("nvfp4", ranks), Toy("nvfp4", ranks), checkpoint)
    assert len(places.rest.placements) == (0 if ranks == 1 else 2)
