"""Codes that are decoded on an accelerator, without one: what is sent, what it takes there, and what is noticed."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import headers, in_blocks, run_plan, same_bytes
from helpers.coded import BLOCKS, coding_of, encoded, write_coded
from octavo import numerics
from octavo.checkpoint.codings import Coding, Decoding
from octavo.checkpoint.header import TensorInfo
from octavo.elements.pieces import Piece, whole
from octavo.errors import WeightError
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.planning.blocks import NOTHING, cut_blocks, cut_reads
from octavo.planning.budget import Budget
from octavo.planning.placement import Target
from octavo.planning.plan import Plan, make_plan
from octavo.planning.recipe import Recipe

from .test_device_memory import META, WATCHED_BYTES, peak_of

FP8, MXFP4, NVFP4, INT4 = BLOCKS, Decoding("e2m1", 1, 32), Decoding("e2m1", 1, 16), Decoding("int4_in_int32", 1, 32)


def target_of(coding, shape, dtype=None):
    return Target(coding.name, tuple(shape), dtype, kinds.LINEAR, (whole(coding.name, shape),))


def spoiled(parts, part, value):
    """The same with one number that is none."""
    tensor = parts[part].clone()
    byte = tensor.view(torch.uint8) if isinstance(value, int) and tensor.element_size() == 1 else tensor
    byte.view(-1)[min(5, byte.numel() - 1)] = value
    return {**parts, part: tensor}


NONE = [
    (FP8, 0, "scale", -1.0),
    (FP8, 0, "scale", 0.0),
    (FP8, 0, "scale", float("nan")),
    (FP8, 0, "scale", float("inf")),
    (FP8, 0, "scale", 2.0**101),
    (FP8, 0, "codes", 0xFF),
    (MXFP4, 0, "scale", 255),
    (NVFP4, 1, "scale", -1.0),
    (NVFP4, 1, "global_scale", 0.0),
    (NVFP4, 1, "global_scale", 2.0**120),
]


@pytest.mark.parametrize(("decoding", "seed", "part", "value"), NONE)
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor"])
def test_what_a_cpu_refuses_is_refused_in_the_same_words(decoding, seed, part, value, scheme, tmp_path):
    coding = coding_of("w", (384, 256), decoding)
    checkpoint, _ = write_coded(tmp_path, {"w": (coding, spoiled(encoded(coding, seed), part, value))})
    plan = make_plan(checkpoint, [target_of(coding, (384, 256))], Recipe(scheme))
    errors = []
    for lanes in (0, 2):
        with pytest.raises(WeightError) as error:
            run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))
        errors.append(re.split(r" of its rows| of \d", str(error.value))[0])
    assert errors[0] == errors[1]


@pytest.mark.parametrize("scheme", ["fp8_channel", None])
@pytest.mark.parametrize(("divided", "power"), [(True, 101), (False, 101)])
def test_global_scales_of_any_size_are_taken_as_on_a_cpu(scheme, divided, power, tmp_path):
    coding = coding_of("w", (128, 256), dataclasses.replace(NVFP4, divided=divided))
    parts = {**encoded(coding, 1), "global_scale": torch.tensor(2.0**power)}
    parts["scale"] = torch.full(coding.grid, 2.0**-6).to(torch.float8_e4m3fn)
    checkpoint, _ = write_coded(tmp_path, {"w": (coding, parts)})
    plan = make_plan(checkpoint, [target_of(coding, (128, 256))], Recipe(scheme))
    (mine, _), (theirs, _) = (run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes)) for lanes in (2, 0))
    assert same_bytes(mine["w"].weight, theirs["w"].weight)


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_weight_that_fp16_does_not_hold_is_refused(lanes, tmp_path):
    coding = coding_of("w", (128, 128), FP8)
    checkpoint, _ = write_coded(tmp_path, {"w": (coding, {**encoded(coding, 0), "scale": torch.full((1, 1), 1e3)})})
    plan = make_plan(checkpoint, [target_of(coding, (128, 128), torch.float16)], Recipe(None))
    with pytest.raises(WeightError, match=r"tensor 'w' holds -?\d+\.\d .*: fp16 holds no number that large"):
        run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_no_number_is_copied_as_it_is_where_nothing_is_quantized(lanes, dtype, tmp_path):
    coding = coding_of("w", (128, 128), FP8)
    checkpoint, _ = write_coded(tmp_path, {"w": (coding, spoiled(encoded(coding, 0), "codes", 0x7F))})
    plan = make_plan(checkpoint, [target_of(coding, (128, 128), dtype)], Recipe(None))
    storages, _ = run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))
    assert storages["w"].weight.isnan().nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize("lanes", [0, 2])
def test_beside_what_is_no_number_a_weight_that_fp16_does_not_hold_is_named(lanes, tmp_path):
    coding = coding_of("w", (128, 128), FP8)
    codes = torch.ones(128, 128)
    codes[3, 9] = 384.0
    parts = spoiled({"codes": codes.to(schemes.FP8), "scale": torch.full((1, 1), 200.0)}, "codes", 0x7F)
    checkpoint, _ = write_coded(tmp_path, {"w": (coding, parts)})
    plan = make_plan(checkpoint, [target_of(coding, (128, 128), torch.float16)], Recipe(None))
    with pytest.raises(WeightError, match=r"holds 76800.0 \(at \[3, 9\]\): fp16"):
        run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))


def test_what_is_sent_is_what_is_stored(tmp_path):
    sources = {}
    for number, decoding in enumerate((FP8, MXFP4, NVFP4)):
        coding = coding_of(f"w{number}", (200, 384), decoding)
        sources[coding.name] = (coding, encoded(coding, 1 if decoding is NVFP4 else 0))
    checkpoint, weights = write_coded(tmp_path, sources, shards=2)
    targets = [target_of(coding, (200, 384)) for coding, _ in sources.values()]
    plan = make_plan(checkpoint, targets, Recipe("fp8_channel"))
    blocks = list(cut_blocks(plan.placements, checkpoint.tensors, 1 << 20))
    sent = sum(run.nbytes for block in blocks for run in block.runs if run.shard != NOTHING)
    assert sent == sum(info.nbytes for info in checkpoint.stored.values())
    assert {run.shard for block in blocks for run in block.runs} >= {0, 1}
    storages, tally = run_plan(checkpoint, plan, budget=in_blocks(plan, block_bytes=1 << 20))
    assert tally.placed_bytes == plan.final_bytes()
    q, scale = schemes.quantize(weights["w0"], "fp8_channel")
    assert same_bytes(storages["w0"].weight, q)
    assert same_bytes(storages["w0"].scale, scale)


def test_zero_points_are_left_to_the_host(tmp_path):
    coding = coding_of("w", (64, 64), INT4)
    for seed, by_host in ((3, False), (1, True)):  # without zero points, and with
        checkpoint, _ = write_coded(tmp_path / str(seed), {"w": (coding, encoded(coding, seed))})
        plan = make_plan(checkpoint, [dataclasses.replace(target_of(coding, (64, 64)), device="cuda")], Recipe())
        assert plan.placements[0].by_host == by_host
        assert bool(Budget.fit(plan.placements, plan.staging_bytes).lanes) != by_host


def experts(decoding: Decoding, rows: int = 128, cols: int = 256, count: int = 4):
    """Matrices of experts, and what becomes of them: gate and up in one stack, down in another."""
    sources = {}
    for expert in range(count):
        for name, shape in (("down", (cols, rows)), ("gate", (rows, cols)), ("up", (rows, cols))):
            coding = coding_of(f"{expert}.{name}", shape, decoding)
            sources[coding.name] = (coding, encoded(coding, 6 * len(sources)))  # of which all have the same dtypes
    both = [
        Piece((expert, at * rows, 0), (1, rows, cols), f"{expert}.{name}", 0, (rows * cols, cols, 1))
        for expert in range(count)
        for at, name in enumerate(("gate", "up"))
    ]
    down = [Piece((n, 0, 0), (1, cols, rows), f"{n}.down", 0, (rows * cols, rows, 1)) for n in range(count)]
    return sources, [
        Target("gate_up", (count, 2 * rows, cols), None, kinds.EXPERTS, tuple(both)),
        Target("down", (count, cols, rows), None, kinds.EXPERTS, tuple(down)),
    ]


@pytest.mark.parametrize("decoding", [FP8, MXFP4, INT4, Decoding("float8", 1, None), Decoding("float8", None, None)])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
def test_experts_are_decoded_together_and_their_bytes_are_those_of_the_host(decoding, scheme, tmp_path):
    sources, wanted = experts(decoding)
    checkpoint, _ = write_coded(tmp_path, sources)
    plan = make_plan(checkpoint, wanted, Recipe(scheme))
    (block,) = cut_blocks(plan.placements, checkpoint.tensors, 1 << 20)
    apart = decoding.group_rows is None  # rows of gate and up then have no groups that could follow each other
    between = decoding is MXFP4  # whose scales are read as they lie, behind the codes of each matrix
    assert [len(bundle.chunks) for bundle in block.bundles] == ([4, 4, 4] if apart or between else [4, 8])
    mine, _ = run_plan(checkpoint, plan, budget=in_blocks(plan, block_bytes=1 << 20))
    theirs, _ = run_plan(checkpoint, plan)
    for name, storage in theirs.items():
        assert same_bytes(mine[name].weight, storage.weight)
        assert storage.scale is None or same_bytes(mine[name].scale, storage.scale)


def large(decoding: Decoding, scheme: str | None, count: int = 6) -> tuple[object, Plan]:
    """Matrices as large as the experts of DeepSeek-V3, of which there are headers alone."""
    shape = (7168, 2048)
    coding = coding_of("", shape, decoding)
    codes_dtype, scale_dtype = {"float8": ("F8_E4M3", "F32"), "e2m1": ("U8", "U8")}[decoding.kind]
    width = 1 if decoding.kind == "float8" else 2
    stored, infos = {}, {}
    for number in range(count):
        stored[f"{number}.codes"] = ((shape[0], shape[1] // width), codes_dtype)
        stored[f"{number}.scale"] = (coding.grid, scale_dtype)
    offset = 8
    for name, (dims, dtype) in stored.items():
        nbytes = dims[0] * dims[1] * (4 if dtype == "F32" else 1)
        infos[name] = TensorInfo(name, dtype, dims, 0, offset, nbytes)
        offset += nbytes
    tensors = {
        f"{number}.up_proj.weight": dataclasses.replace(
            infos[f"{number}.codes"],
            name=f"{number}.up_proj.weight",
            dtype_name="BF16",
            shape=shape,
            coding=Coding("w", shape, decoding, infos[f"{number}.codes"], infos[f"{number}.scale"]),
        )
        for number in range(count)
    }
    checkpoint = dataclasses.replace(headers({}), tensors=tensors)
    wanted = [Target(name, shape, None, kinds.LINEAR, (whole(name, shape),)) for name in tensors]
    return checkpoint, make_plan(checkpoint, wanted, Recipe(scheme))


@pytest.mark.parametrize("decoding", [FP8, MXFP4])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "mxfp8", "fp8_tensor", None])
def test_nothing_waits_for_a_device_and_all_is_within_the_budget(decoding, scheme, monkeypatch):
    checkpoint, plan = large(decoding, scheme)
    budget = Budget.on_accelerator(META, 256 << 20, 16, coded=True)
    assert peak_of(checkpoint, plan, budget, monkeypatch) <= budget.lanes * (budget.lane_bytes + WATCHED_BYTES)


class Kernels:
    """Stands for kernels where there is no device that could run them: has all, and counts launches."""

    def __init__(self) -> None:
        self.launched = 0

    def takes(self, *_: object) -> bool:
        return True

    makes = takes

    def decode_into(self, *_: object) -> None:
        self.launched += 1

    def copy_into(self, *_: object) -> None:
        self.launched += 2  # of codes, and of scales

    def quantize_into(self, *_: object, lossless: bool, window: slice | None) -> None:
        self.launched += 1


@pytest.mark.parametrize("decoding", [FP8, MXFP4])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
def test_by_kernels_a_bundle_takes_a_launch_or_two(decoding, scheme, monkeypatch):
    checkpoint, plan = large(decoding, scheme)
    budget = Budget.on_accelerator(META, 256 << 20, 16, coded=True)
    blocks = list(cut_blocks(plan.placements, checkpoint.tensors, budget.block_bytes))
    bundles = sum(len(block.bundles) for block in blocks)
    copies = sum(1 for _ in cut_reads(blocks, budget.read_bytes))
    kernels, counted = Kernels(), Counter()
    schemes.warm_up(META)  # once for all streams
    monkeypatch.setattr(numerics.decoding, "kernel", lambda device: kernels)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds_of, args=(), kwargs=None):
            counted[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Counting():
        peak_bytes = peak_of(checkpoint, plan, budget, monkeypatch)
    passed = scheme == "fp8_block" and decoding is FP8
    assert kernels.launched == bundles * (2 if passed else 1)
    assert counted["copy_"] == copies  # of slots
    views = {"alias", "as_strided", "view", "slice", "select", "detach", "empty", "zeros", "copy_"}
    assert not set(counted) - views
    # no weight is decoded into memory
    assert peak_bytes <= budget.lanes * (budget.block_bytes + WATCHED_BYTES) + (1 << 20)


def test_scales_that_lie_between_codes_are_read_with_them(tmp_path):
    sources, wanted = experts(MXFP4)  # whose codes and scales are bytes alike, and so are in the order of their names
    checkpoint, _ = write_coded(tmp_path, sources)
    plan = make_plan(checkpoint, wanted, Recipe("fp8_channel"))
    (block,) = cut_blocks(plan.placements, checkpoint.tensors, 1 << 20)
    (run,) = [run for run in block.runs if run.shard != NOTHING]
    assert run.nbytes == sum(info.nbytes for info in checkpoint.stored.values())
