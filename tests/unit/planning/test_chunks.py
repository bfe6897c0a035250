"""Chunks and tiles: every element once, scale groups whole, nothing beyond its limit."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from helpers import SCHEMES, headers
from octavo.elements.symbolic import Symbolic
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.planning.chunks import Chunk, Work, cut_placements, cut_tiles, default_slot_bytes
from octavo.planning.placement import Placement, Target
from octavo.planning.plan import Plan, make_plan, plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.planning.stacks import NAMINGS, find_experts

SLOTS = (900, 5000, 20_000, 1 << 20)


def symbol(checkpoint, name: str) -> Symbolic:
    return Symbolic.source(name, checkpoint.tensors[name].shape, torch.bfloat16)


def layouts() -> dict[str, tuple]:
    """name -> (checkpoint, parameter, whether it is transposed)"""
    one = headers({"a": (300, 200)})
    wide = headers({"a": (3, 5000)})
    pair = headers({"a": (150, 140), "b": (90, 140)})
    experts = headers({f"{n}{e}": (70, 150) for e in range(3) for n in "ab"})
    stack = headers({"a": (3, 140, 150)})
    gate = torch.stack([symbol(experts, f"a{e}") for e in range(3)])
    up = torch.stack([symbol(experts, f"b{e}") for e in range(3)])
    return {
        "matrix": (one, symbol(one, "a"), False),
        "wide matrix": (wide, symbol(wide, "a"), False),
        "transposed matrix": (one, symbol(one, "a").t(), False),
        "permuted rows": (one, symbol(one, "a").view(2, 2, 75, 200).transpose(1, 2).reshape(300, 200), False),
        "fused": (pair, torch.cat([symbol(pair, "a"), symbol(pair, "b")]), False),
        "side by side": (pair, torch.cat([symbol(pair, "a")[:90], symbol(pair, "b")], 1), False),
        "fused experts": (experts, torch.cat([gate, up], 1), False),
        "stack": (stack, symbol(stack, "a"), False),
        "transposed stack": (stack, symbol(stack, "a"), True),
        "vector": (headers({"a": (5000,)}), symbol(headers({"a": (5000,)}), "a"), False),
        "scalar": (headers({"a": ()}), symbol(headers({"a": ()}), "a"), False),
        "empty": (headers({"a": (0, 7)}), symbol(headers({"a": (0, 7)}), "a"), False),
    }


LAYOUTS = layouts()
MATRICES = [name for name, (_, parameter, _) in LAYOUTS.items() if parameter.ndim > 1 and parameter.numel()]


def plan_of(layout: str, scheme: str | None) -> Plan:
    checkpoint, parameter, transposed = LAYOUTS[layout]
    kind = {2: kinds.LINEAR, 3: kinds.EXPERTS}.get(parameter.ndim, "vector")
    wanted = Target("p", tuple(parameter.shape), None, kind, tuple(parameter.pieces), transposed=transposed)
    return make_plan(checkpoint, [wanted], Recipe(scheme))


def cell_ids(placement: Placement) -> np.ndarray:
    """The scale group of every element, worked out naively: [..., out, in, 2] of (row group, column group)."""
    scheme = schemes.get(placement.scheme)
    *lead, rows, cols = placement.shape
    row_ids, cell = [], 0
    for part in placement.parts:
        row_ids += [cell + i // (scheme.group_rows or part) for i in range(part)]
        cell = row_ids[-1] + 1
    col_ids = [i // (scheme.group_cols or cols) for i in range(cols)]
    grid = np.stack(np.meshgrid(row_ids, col_ids, indexing="ij"), -1)
    return np.broadcast_to(grid, (*lead, rows, cols, 2))


def index(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(chunk.piece.dst_off, chunk.piece.dst_end, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_chunks_write_every_element_once_and_fit_their_slot(scheme, layout):
    plan = plan_of(layout, scheme)
    for slot_bytes in SLOTS:
        check_coverage(plan, slot_bytes)


def check_coverage(plan: Plan, slot_bytes: int) -> None:
    (placement,) = plan.placements
    count = {work: np.zeros(placement.shape, np.int32) for work in Work}
    chunks = list(cut_placements(plan.placements, slot_bytes))
    for chunk in chunks:
        assert chunk.nbytes == chunk.piece.numel * 2 <= slot_bytes
        assert (chunk.work is Work.COPY) == (placement.scheme is None)
        count[chunk.work][index(chunk)] += 1
    assert (count[Work.COPY] + count[Work.QUANTIZE] + count[Work.REREAD] == 1).all()
    assert (count[Work.AMAX] == count[Work.REREAD]).all()
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


@pytest.mark.parametrize("layout", MATRICES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_know_their_scale_groups_and_hold_them_whole(scheme, layout):
    plan = plan_of(layout, scheme)
    for slot_bytes in SLOTS:
        check_groups(plan, slot_bytes)


def check_groups(plan: Plan, slot_bytes: int) -> None:
    (placement,) = plan.placements
    found, ids = schemes.get(placement.scheme), cell_ids(placement)
    starts = [0, *itertools.accumulate(placement.parts)]
    units: dict[int, list[Chunk]] = {}
    for chunk in cut_placements(plan.placements, slot_bytes):
        touched = ids[index(chunk)].reshape(-1, 2)
        low, high = touched.min(0).tolist(), touched.max(0).tolist()
        assert [(c.start, c.stop) for c in chunk.cells[-2:]] == [(a, b + 1) for a, b in zip(low, high, strict=True)]
        assert chunk.cells[:-2] == index(chunk)[:-2]
        row = chunk.piece.dst_off[-2] - max(s for s in starts if s <= chunk.piece.dst_off[-2])
        assert chunk.phase[0] == (row % found.group_rows if found.group_rows else 0)
        assert chunk.phase[1] == (chunk.piece.dst_off[-1] % found.group_cols if found.group_cols else 0)
        units.setdefault(chunk.unit, []).append(chunk)
    # number the scale groups, experts apart; whoever scales a group must hold all of its elements
    experts = np.arange(ids[..., 0].size // (ids.shape[-3] * ids.shape[-2])).reshape(-1, 1, 1)
    rows, cols = ids[..., 0].max() + 1, ids[..., 1].max() + 1
    numbers = ((experts * rows + ids[..., 0]) * cols + ids[..., 1]).reshape(placement.shape)
    sizes = np.bincount(numbers.reshape(-1))
    for chunks in units.values():
        works = [chunk.work for chunk in chunks]
        if Work.QUANTIZE in works:
            assert set(works) == {Work.QUANTIZE}
            scaled_together = [[chunk] for chunk in chunks]
        else:
            assert works == sorted(works, key=[Work.AMAX, Work.REREAD].index)
            scaled_together = [[chunk for chunk in chunks if chunk.work is Work.REREAD]]
        for group in scaled_together:
            held = np.concatenate([numbers[index(chunk)].reshape(-1) for chunk in group])
            found_numbers, counts = np.unique(held, return_counts=True)
            assert (sizes[found_numbers] == counts).all()


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
@pytest.mark.parametrize("slot_bytes", [2, 3, 16])
def test_a_slot_may_be_as_small_as_an_element(scheme, slot_bytes):
    checkpoint = headers({"a": (5, 40)})
    wanted = Target("p", (40, 5), None, kinds.LINEAR, tuple(symbol(checkpoint, "a").t().pieces))
    count = np.zeros((40, 5), np.int32)
    for chunk in cut_placements(make_plan(checkpoint, [wanted], Recipe(scheme)).placements, slot_bytes):
        assert chunk.piece.numel * 2 <= slot_bytes
        count[index(chunk)] += chunk.work is not Work.AMAX
    assert (count == 1).all()


def works(plan: Plan, slot_bytes: int) -> Counter:
    return Counter(chunk.work for chunk in cut_placements(plan.placements, slot_bytes))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_fits_a_slot_is_one_chunk(scheme):
    assert works(plan_of("stack", scheme), 1 << 20) == {Work.QUANTIZE: 1}


def test_rows_are_quantized_as_they_come():
    assert works(plan_of("matrix", "fp8_channel"), 30 * 200 * 2) == {Work.QUANTIZE: 10}
    assert works(plan_of("matrix", "fp8_block"), 128 * 200 * 2) == {Work.QUANTIZE: 3}


def test_a_tensor_wide_scale_of_a_large_tensor_needs_two_readings():
    assert works(plan_of("matrix", "fp8_tensor"), 30 * 200 * 2) == {Work.AMAX: 10, Work.REREAD: 10}


def test_experts_with_a_scale_each_are_read_twice_one_after_the_other():
    order = [
        (chunk.work, chunk.piece.dst_off[0])
        for chunk in cut_placements(plan_of("stack", "fp8_tensor").placements, 20_000)
    ]
    assert [expert for _, expert in order] == sorted(expert for _, expert in order)
    assert [work for work, _ in order[:6]] == [Work.AMAX] * 3 + [Work.REREAD] * 3


def test_a_transposed_source_is_read_twice_rather_than_in_tiny_runs():
    assert set(works(plan_of("transposed stack", "fp8_channel"), 20_000)) == {Work.AMAX, Work.REREAD}
    for chunk in cut_placements(plan_of("transposed stack", "fp8_channel").placements, 20_000):
        assert chunk.piece.runs()[0] == chunk.piece.numel  # one read a chunk


def matrices_of_a_transposed_stack(hidden: int, rows: int, scheme: str) -> Plan:
    shapes = {"m.experts.gate_up_proj": (3, hidden, 2 * rows), "m.experts.down_proj": (3, rows, hidden)}
    checkpoint = headers(shapes)
    cuts = [experts.cut(NAMINGS[0]) for experts in find_experts(checkpoint)]
    return plan_checkpoint(checkpoint, Recipe(scheme), cuts=cuts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_matrix_of_a_transposed_stack_is_read_once_if_it_fits_however_short_its_runs(scheme):
    plan = matrices_of_a_transposed_stack(96, 32, scheme)
    assert works(plan, 96 * 32 * 2) == {Work.QUANTIZE: 9}
    assert {chunk.piece.run_length for chunk in cut_placements(plan.placements, 96 * 32 * 2)} == {32, 96 * 32}


def test_a_slot_takes_a_transposed_matrix_whole_where_that_is_no_more_than_8_mib():
    assert default_slot_bytes(matrices_of_a_transposed_stack(2048, 768, "fp8_channel").placements, 1 << 28) == 3 << 20
    assert default_slot_bytes(matrices_of_a_transposed_stack(4096, 4096, "fp8_channel").placements, 1 << 28) == 8 << 20


def test_groups_across_two_sources_are_read_twice():
    assert set(works(plan_of("side by side", "fp8_channel"), 1 << 20)) == {Work.AMAX, Work.REREAD}


def test_units_are_not_shared_between_placements():
    checkpoint = headers({"a.weight": (300, 200), "b.weight": (300, 200), "c": (5,)})
    targets = [
        Target(n, tuple(s.shape), None, kinds.LINEAR, tuple(s.pieces))
        for n, s in ((n, symbol(checkpoint, n)) for n in ("a.weight", "b.weight"))
    ]
    seen: dict[int, set[str]] = {}
    for chunk in cut_placements(make_plan(checkpoint, targets, Recipe("fp8_tensor")).placements, 5000):
        seen.setdefault(chunk.unit, set()).add(chunk.placement.name)
    assert [len(names) for names in seen.values()] == [1, 1]


def test_default_slots_hold_128_rows_of_the_widest_matrix():
    def slot(cols: int, staging: int = 256 << 20) -> int:
        shape = headers({"a": (4, cols)})
        wanted = Target("a", (4, cols), None, kinds.LINEAR, tuple(symbol(shape, "a").pieces))
        return default_slot_bytes(make_plan(shape, [wanted], Recipe(), staging).placements, staging)

    assert slot(64) == 1 << 20
    assert slot(8192) == 128 * 8192 * 4
    assert slot(1 << 20) == 8 << 20
    assert slot(8192, 4 << 20) == 1 << 20


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [(0, 0), (100, 0), (0, 5), (127, 31)])
@pytest.mark.parametrize(
    ("shape", "limit"),
    [
        ((150, 140), 1000),
        ((150, 140), 17_000),
        ((2, 40, 150), 97),
        ((2, 40, 150), 1 << 20),
        ((1, 300), 1),
        ((3, 1, 1), 1),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tiles_cover_a_chunk_once_and_fit_scratch(scheme, shape, limit, phase):
    found = schemes.get(scheme)
    phase = (phase[0] if found.group_rows == 128 else 0, phase[1] if found.group_cols else 0)
    writes = torch.zeros(shape, dtype=torch.int32)
    for tile in cut_tiles(shape, found, phase, limit):
        tile.region(writes).add_(1)
        assert tile.box.numel <= limit
        for axis, group in ((-2, found.group_rows), (-1, found.group_cols)):
            at = phase[axis] + tile.box.dst_off[axis]
            end = phase[axis] + tile.box.dst_end[axis] - 1
            assert tile.phase[axis] == (at % group if group else 0)
            expected = (at // group, end // group + 1) if group else (0, 1)
            assert (tile.cells[axis].start, tile.cells[axis].stop) == expected
    assert bool((writes == 1).all())
