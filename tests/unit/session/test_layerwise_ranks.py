"""Models that load themselves, on every rank: layers finished after their last write, to the definition's bytes."""

from __future__ import annotations

import pytest
import torch

from helpers import SCHEMES, same_bytes
from helpers.engine import Model, Rank, checkpoint, fused_parts
from helpers.layerwise import WIDE, assert_finished_at_once, assert_quantized_like, loaded_plainly
from octavo.numerics import schemes
from octavo.session import Session

RANKS = [Rank(number, size) for size in (1, 2, 4, 8) for number in {0, size // 2, size - 1}]


@pytest.mark.parametrize("rank", RANKS, ids=lambda rank: f"{rank.number}of{rank.size}")
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
def test_every_rank_has_the_bytes_of_its_partition(rank: Rank, moe: bool, direct: bool) -> None:
    pairs = checkpoint(WIDE, moe=moe)
    reference = loaded_plainly(Model(WIDE, rank, moe=moe), pairs.items())
    # a layer that is complete is quantized by the definition itself
    for scheme in SCHEMES if direct else ("fp8_channel", "fp8_block"):
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
