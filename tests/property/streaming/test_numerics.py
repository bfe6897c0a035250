"""One numeric definition: whatever the chunks, threads, budget and layout, the bytes are those of the whole tensor.

Each example is a real checkpoint on disk, streamed into memory, and compared with ``schemes.quantize`` on the whole
tensor and with the naive definition in `helpers.reference`.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from hypothesis import example, given, note
from hypothesis import strategies as st

from helpers import DTYPES, SCHEMES, headers, random_weights, reference, run_plan, same_bytes, write_checkpoint
from helpers.properties import examples
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.boxes import coverage_problem
from octavo.elements.symbolic import Symbolic
from octavo.numerics import schemes
from octavo.planning import chunks, kinds
from octavo.planning.budget import Budget
from octavo.planning.chunks import Work, cut_placements
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan, plan_checkpoint
from octavo.planning.recipe import Recipe

#: sides on either side of the edges of groups (32, 128), and in between
SIDES = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 100, 127, 128, 129, 160, 255, 256, 257, 300]))
KINDS = st.sampled_from(["normal", "bits", "sparse"])


class Way(NamedTuple):
    """How a plan is executed."""

    slot_bytes: int | None
    threads: int | None
    staging_bytes: int
    tile_elements: int  # of scratch memory
    min_run_bytes: int  # shorter reads are avoided by reading twice
    lanes: int = 0  # more than 0: in blocks, as on an accelerator
    block_slots: int = 1


WAYS = st.builds(
    Way,
    st.one_of(st.none(), st.sampled_from([700, 2000, 4096, 10_000, 33_000, 100_000])),
    st.one_of(st.none(), st.sampled_from([1, 2, 5])),
    st.sampled_from([1 << 20, 3 << 20, 256 << 20]),
    st.sampled_from([50, 300, 1000, 5000, 1 << 19]),
    st.sampled_from([1, 256, 4096]),
    st.sampled_from([0, 0, 1, 3]),
    st.sampled_from([1, 2, 5]),
)


def streamed(folder: Path, sources: dict[str, torch.Tensor], target: Target, scheme: str, way: Way):
    """Write a checkpoint, stream the target out of it: (placement, q, scale)."""
    checkpoint = Checkpoint.open(write_checkpoint(folder, sources, shards=min(2, len(sources))))
    plan = make_plan(checkpoint, [target], Recipe(scheme), way.staging_bytes)
    fit = Budget.fit(plan.placements, plan.staging_bytes, way.threads, way.slot_bytes)
    scratch = min(fit.scratch_elements, way.tile_elements)
    budget = dataclasses.replace(
        fit, scratch_elements=scratch, lanes=way.lanes, block_bytes=way.block_slots * fit.slot_bytes
    )
    with mock.patch.object(chunks, "_MIN_RUN_BYTES", way.min_run_bytes):
        storages, tally = run_plan(checkpoint, plan, budget=budget)
    (placement,) = plan.placements
    assert placement.scheme == scheme
    assert placement.source_bytes <= tally.read_bytes <= 2 * placement.source_bytes
    note(f"{placement.parts=} {placement.shape=}")
    return placement, storages[target.name].weight, storages[target.name].scale


def check(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, scheme: str, parts: tuple[int, ...]) -> None:
    """Against the definition, against the naive definition, and within the error bound."""
    whole_q, whole_scale = schemes.quantize(weight, scheme, parts)
    assert same_bytes(scale, whole_scale)
    assert same_bytes(q, whole_q)
    naive_q, naive_scale = reference.quantize(weight, scheme, parts)
    assert torch.equal(scale.float().reshape(naive_scale.shape), naive_scale)
    assert same_bytes(q, naive_q)
    check_bound(weight, q, scale, scheme, parts)


def check_bound(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, scheme: str, parts) -> None:
    """``|w − q·scale| ≤ max(|w|/16, scale·2⁻¹⁰)`` in FP8, half a scale in int8, and float32's rounding of w / scale.

    e4m3 has 4 significant bits: half a unit in the last place is 1/16 of the magnitude at most; below 2⁻⁶ its numbers
    are 2⁻⁹ apart, so half of that, 2⁻¹⁰, is the error there.
    """
    largest = schemes.get(scheme).numbers.largest
    w = weight.double().abs()
    factors = schemes.expand_scale(scale, weight.shape, scheme, parts).double().expand(weight.shape)
    # to which bf16 scales of subnormal quotients, rounded down in float32, come as near as 2**-16
    assert bool((w <= factors * largest * (1 + 2.0**-16)).all())
    # the quotient is rounded to float32: relatively by 2**-24, or by 2**-150 where it is subnormal
    rounding = factors / 2 if scheme == "int8_channel" else torch.maximum(w / 16, factors * 2.0**-10)
    bound = rounding + w * 2.0**-23 + factors * 2.0**-149
    assert bool(((weight.double() - q.double() * factors).abs() <= bound).all())


@examples(40)
@given(
    shape=st.tuples(SIDES, SIDES),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
)
@example((300, 257), "fp8_tensor", torch.bfloat16, "normal", 0, Way(1000, 5, 1 << 20, 100, 4096))
@example((257, 300), "fp8_block", torch.float32, "bits", 0, Way(500, 2, 1 << 20, 7, 1))
def test_any_way_of_streaming_a_matrix_gives_the_bytes_of_the_whole(shape, scheme, dtype, kind, seed, way):
    weight = random_weights(shape, dtype, seed, kind)
    with tempfile.TemporaryDirectory() as folder:
        source = Symbolic.source("a", shape, dtype)
        target = Target("p", shape, None, kinds.LINEAR, tuple(source.pieces))
        placement, q, scale = streamed(Path(folder), {"a": weight}, target, scheme, way)
    check(weight, q, scale, scheme, placement.parts)


@examples(25)
@given(
    shape=st.tuples(st.integers(1, 4), SIDES, SIDES),
    transposed=st.booleans(),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
)
@example((2, 130, 140), True, "fp8_channel", torch.bfloat16, "normal", 0, Way(3000, 2, 1 << 20, 100, 4096))
@example((2, 130, 140), True, "mxfp8", torch.float16, "bits", 0, Way(3000, 2, 1 << 20, 100, 1))
def test_any_way_of_streaming_a_stack_gives_the_bytes_of_its_experts_alone(
    shape, transposed, scheme, dtype, kind, seed, way
):
    stack = random_weights(shape, dtype, seed, kind)  # [experts, in, out] when transposed
    with tempfile.TemporaryDirectory() as folder:
        source = Symbolic.source("a", shape, dtype)
        target = Target("p", shape, None, kinds.EXPERTS, tuple(source.pieces), transposed=transposed)
        placement, q, scale = streamed(Path(folder), {"a": stack}, target, scheme, way)
    weight = stack.mT if transposed else stack
    assert placement.shape == weight.shape
    check(weight.contiguous(), q, scale, scheme, placement.parts)
    for expert in range(shape[0]):
        alone_q, alone_scale = schemes.quantize(weight[expert], scheme)
        assert same_bytes(q[expert], alone_q)
        assert torch.equal(scale[expert].float().flatten(), alone_scale.float().flatten())


@examples(20)
@given(
    rows=st.lists(SIDES, min_size=2, max_size=3),
    cols=SIDES,
    experts=st.one_of(st.none(), st.integers(1, 3)),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
)
@example([100, 60], 150, 2, "fp8_block", torch.bfloat16, "normal", 0, Way(4096, 2, 1 << 20, 100, 1))
def test_fused_parameters_are_quantized_source_by_source(rows, cols, experts, scheme, dtype, kind, seed, way):
    """Gate and up (and the like) of checkpoint tensors of their own: bytes as if each were alone."""
    sources = {
        f"{part}.{expert}": random_weights((n, cols), dtype, seed + 10 * part + expert, kind)
        for part, n in enumerate(rows)
        for expert in range(experts or 1)
    }
    symbols = {name: Symbolic.source(name, tensor.shape, dtype) for name, tensor in sources.items()}

    def fuse(tensors):
        bands = [[tensors[f"{part}.{expert}"] for expert in range(experts or 1)] for part in range(len(rows))]
        return torch.cat([band[0] if experts is None else torch.stack(band) for band in bands], -2)

    fused = fuse(symbols)
    with tempfile.TemporaryDirectory() as folder:
        target = Target(
            "p", tuple(fused.shape), None, kinds.LINEAR if experts is None else kinds.EXPERTS, tuple(fused.pieces)
        )
        placement, q, scale = streamed(Path(folder), sources, target, scheme, way)
    assert placement.parts == tuple(rows)
    check(fuse(sources), q, scale, scheme, placement.parts)
    start = 0
    for part, n in enumerate(rows):
        for expert in range(experts or 1):
            alone, _ = schemes.quantize(sources[f"{part}.{expert}"], scheme)
            here = q if experts is None else q[expert]
            assert same_bytes(here[start : start + n], alone)
        start += n


@examples(30)
@given(
    heads=st.integers(1, 4),
    half=st.integers(1, 40),
    cols=SIDES,
    move=st.sampled_from(["rope", "transposed", "swapped halves", "columns"]),
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(DTYPES),
    kind=KINDS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
)
@example(3, 40, 130, "rope", "fp8_block", torch.bfloat16, "normal", 0, Way(1000, 5, 1 << 20, 100, 1))
def test_rows_that_move_are_quantized_where_they_arrive(heads, half, cols, move, scheme, dtype, kind, seed, way):
    weight = random_weights((heads * 2 * half, cols), dtype, seed, kind)

    def moved(tensor):
        if move == "rope":
            return tensor.view(heads, half, 2, cols).transpose(1, 2).reshape(heads * 2 * half, cols)
        if move == "transposed":
            return tensor.t()
        if move == "columns":
            return torch.cat(tensor.split(max(1, cols // 3), 1)[::-1], 1)
        return torch.cat(tensor.chunk(2)[::-1])

    symbolic = moved(Symbolic.source("a", weight.shape, dtype))
    with tempfile.TemporaryDirectory() as folder:
        target = Target("p", tuple(symbolic.shape), None, kinds.LINEAR, tuple(symbolic.pieces))
        placement, q, scale = streamed(Path(folder), {"a": weight}, target, scheme, way)
    check(moved(weight).contiguous(), q, scale, scheme, placement.parts)


@examples(30)
@given(
    scheme=st.sampled_from(SCHEMES),
    exponents=st.lists(st.integers(-133, 127), min_size=1, max_size=40),
    cols=st.sampled_from([1, 3, 32, 40]),
    seed=st.integers(0, 1 << 30),
)
@example("fp8_tensor", [-133, 127], 3, 0)
@example("mxfp8", list(range(-133, -100)), 40, 0)
@example("int8_channel", list(range(-133, -100)), 40, 0)
def test_the_error_is_bounded_for_every_finite_bf16(scheme, exponents, cols, seed):
    """Rows of magnitudes of their own, from the smallest subnormal to the largest number."""
    generator = torch.Generator().manual_seed(seed)
    mantissas = torch.rand(len(exponents), cols, generator=generator, dtype=torch.float64) * 1.99
    weight = (mantissas * torch.tensor(exponents, dtype=torch.float64).exp2()[:, None]).bfloat16()
    assert bool(torch.isfinite(weight).all())
    q, scale = schemes.quantize(weight, scheme)
    check(weight, q, scale, scheme, (len(exponents),))


@given(st.data())
def test_a_plan_covers_every_element_once(data):
    """Random cuts and moves of random tensors; random slots. At most a hundred of them, so that none takes minutes."""
    counted = itertools.count()

    def tensor(rows: int, cols: int) -> tuple[str, int, int]:
        return f"t{next(counted)}", rows, cols

    rows, cols = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    bands, shapes, left = [], {}, rows
    while left:
        height = data.draw(st.integers(min(left, -(-rows // 10)), left))
        left -= height
        band, width = [], cols
        while width:
            name, n, m = tensor(height, data.draw(st.integers(min(width, -(-cols // 10)), width)))
            width -= m
            shapes[name] = (m, n) if data.draw(st.booleans()) else (n, m)
            symbolic = Symbolic.source(name, shapes[name], torch.bfloat16)
            band.append(symbolic if shapes[name] == (n, m) else symbolic.t())
        bands.append(torch.cat(band, 1))
    parameter = torch.cat(bands)
    assert coverage_problem((rows, cols), parameter.pieces) is None
    scheme = data.draw(st.sampled_from([*SCHEMES, None]))
    wanted = Target("p", (rows, cols), None, kinds.LINEAR, tuple(parameter.pieces))
    plan = make_plan(headers(shapes), [wanted], Recipe(scheme))
    slot_bytes = data.draw(st.sampled_from([50, 400, 3000, 20_000, 1 << 20]))
    written, measured = torch.zeros(rows, cols, dtype=torch.int32), torch.zeros(rows, cols, dtype=torch.int32)
    twice = torch.zeros(rows, cols, dtype=torch.int32)
    for chunk in cut_placements(plan.placements, slot_bytes):
        assert chunk.nbytes <= slot_bytes
        chunk.piece.region(measured if chunk.work is Work.AMAX else written).add_(1)
        if chunk.work is Work.REREAD:
            chunk.piece.region(twice).add_(1)
    assert bool((written == 1).all())
    assert torch.equal(measured, twice)


@examples(30)
@given(
    tensors=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(\.[0-9a-z]{1,5}){0,3}", fullmatch=True),
        st.tuples(
            st.lists(st.integers(0, 7), max_size=4),
            st.sampled_from(
                [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
            ),
        ),
        min_size=1,
        max_size=8,
    ),
    shards=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
)
def test_writing_then_opening_and_streaming_is_identity(tensors, shards, seed):
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.randint(0, 2 if dtype == torch.bool else 200, shape, generator=generator).to(dtype)
        for name, (shape, dtype) in tensors.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(write_checkpoint(Path(folder), made, min(shards, len(made))))
        assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()
        }
        storages, _ = run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe(None)), threads=2, slot_bytes=256)
    for name, tensor in made.items():
        assert same_bytes(storages[name].weight, tensor)
