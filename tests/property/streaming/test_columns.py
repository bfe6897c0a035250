"""Columns that have a place here are those of the whole quantized tensor, bit for bit, whatever is read at once."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from unittest import mock

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import DTYPES, SCHEMES, random_weights, run_plan, same_bytes, write_checkpoint
from helpers.properties import examples
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.symbolic import Symbolic
from octavo.numerics import schemes
from octavo.planning import chunks, kinds
from octavo.planning.budget import Budget
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe

from .test_numerics import KINDS, SIDES, WAYS, Way


def streamed(sources, target, scheme, way, columns):
    """Stream some columns of the target out of a checkpoint of the sources: (placement, what is stored)."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(write_checkpoint(Path(folder), sources, shards=min(2, len(sources))))
        plan = make_plan(checkpoint, [target], Recipe(scheme), way.staging_bytes)
        placement = dataclasses.replace(plan.placements[0], columns=columns)
        plan = dataclasses.replace(plan, placements=(placement,))
        fit = Budget.fit(plan.placements, plan.staging_bytes, way.threads, way.slot_bytes)
        scratch = min(fit.scratch_elements, way.tile_elements)
        budget = dataclasses.replace(
            fit, scratch_elements=scratch, lanes=way.lanes, block_bytes=way.block_slots * fit.slot_bytes
        )
        with mock.patch.object(chunks, "_MIN_RUN_BYTES", way.min_run_bytes):
            storages, tally = run_plan(checkpoint, plan, budget=budget)
            planned = sum(c.nbytes for c in chunks.cut_placements(plan.placements, budget.chunk_bytes))
    assert tally.read_bytes == planned
    assert tally.placed_bytes == placement.final_bytes
    return placement, storages["p"]


@examples(40)
@given(
    rows=st.lists(SIDES, min_size=1, max_size=2),
    cols=SIDES,
    stacked=st.one_of(st.none(), st.integers(1, 3)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    half=st.sampled_from([None, 0, 1]),
    scheme=st.sampled_from([*SCHEMES, None]),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
    transposed=st.booleans(),
)
@example([130], 300, 2, (0.4, 0.6), 1, "fp8_block", torch.bfloat16, "normal", 0, Way(700, 2, 1 << 20, 50, 1, 3), False)
@example([64], 257, None, (0.5, 1), None, "fp8_channel", torch.bfloat16, "bits", 0, Way(100, 2, 1 << 20, 50, 1), False)
def test_columns_are_those_of_the_whole(rows, cols, stacked, cut, half, scheme, dtype, kind, seed, way, transposed):
    """Gate and up (or one matrix) of experts (or of none), of which a rank has some columns, of all rows or of half.

    Then other ranks' rows lie between those that are read.
    """
    sources = {
        f"{part}.{expert}": random_weights(
            (cols, n) if transposed else (n, cols), dtype, seed + 10 * part + expert, kind
        )
        for part, n in enumerate(rows)
        for expert in range(stacked or 1)
    }

    def halved(tensor):
        middle = tensor.shape[0] // 2
        return tensor if half is None or not middle else tensor[middle:] if half else tensor[:middle]

    def fuse(tensors):
        tensors = {name: halved(tensor.mT if transposed else tensor) for name, tensor in tensors.items()}
        bands = [[tensors[f"{part}.{expert}"] for expert in range(stacked or 1)] for part in range(len(rows))]
        return torch.cat([band[0] if stacked is None else torch.stack(band) for band in bands], -2)

    start, stop = sorted(round(at * cols) for at in cut)
    start, stop = (start, stop) if start < stop else (max(0, start - 1), max(1, start))
    fused = fuse({name: Symbolic.source(name, tensor.shape, dtype) for name, tensor in sources.items()})
    role = kinds.LINEAR if stacked is None else kinds.EXPERTS
    target = Target("p", tuple(fused.shape), None, role, tuple(fused.pieces))
    placement, storage = streamed(sources, target, scheme, way, (start, stop))
    whole = fuse(sources).contiguous()
    if scheme is None:
        assert same_bytes(storage.weight, whole[..., start:stop])
        return
    q, scale = schemes.quantize(whole, scheme, placement.parts)
    assert same_bytes(storage.weight, q[..., start:stop])
    group = schemes.get(scheme).group_cols
    assert same_bytes(storage.scale, scale if group is None else scale[..., start // group : -(-stop // group)])
