"""Streams on real files into parameters: the bytes, weights that are not finite, sources that change."""

from __future__ import annotations

import importlib
import json
import math
import os
import struct
import threading
import time
from dataclasses import replace

import pytest
import torch

from helpers import (
    DTYPES,
    SCHEMES,
    in_blocks,
    one_tensor,
    random_weights,
    run_plan,
    same_bytes,
    threads_of_octavo,
    write_checkpoint,
)
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.pieces import whole
from octavo.elements.symbolic import Symbolic
from octavo.errors import CheckpointError, SourceChangedError, WeightError
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.planning.blocks import cut_blocks, cut_in_turn
from octavo.planning.placement import Target
from octavo.planning.plan import Plan, make_plan, plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.streaming.sinks import ParameterSink, Storage
from octavo.streaming.stream import Stream, execute

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(60)]


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_stream_into_parameters_gives_the_bytes_of_quantizing_each_whole(checkpoint, tensors, scheme):
    plan = plan_checkpoint(checkpoint, Recipe(scheme))
    assert len(plan.quantized) == 3
    storages, _ = run_plan(checkpoint, plan)
    for placement in plan.placements:
        found = storages[placement.name]
        if placement.scheme is None:
            assert same_bytes(found.weight, tensors[placement.name])
            continue
        q, scale = schemes.quantize(tensors[placement.name], scheme)
        assert same_bytes(found.weight, q)
        assert same_bytes(found.scale, scale)


@pytest.mark.parametrize("lanes", [0, 2])
def test_a_default_device_that_the_caller_has_set_changes_nothing(checkpoint, tensors, lanes):
    """vLLM loads inside of ``with torch.device("cuda")``, where what names no device would be put there."""
    plan = plan_checkpoint(checkpoint, Recipe("fp8_block"))
    with torch.device("meta"):
        storages, _ = run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes, block_bytes=1 << 17))
    for placement in plan.quantized:
        q, scale = schemes.quantize(tensors[placement.name], "fp8_block")
        assert same_bytes(storages[placement.name].weight, q)
        assert same_bytes(storages[placement.name].scale, scale)


def test_a_stream_counts_what_it_does(checkpoint):
    plan = plan_checkpoint(checkpoint, Recipe("fp8_channel"))
    _, tally = run_plan(checkpoint, plan)
    assert tally.read_bytes == checkpoint.nbytes == plan.read_bytes
    assert tally.placed_bytes == plan.final_bytes()
    assert min(tally.read_s, tally.quantize_s) > 0


def test_a_stream_counts_what_it_reads_twice(tmp_path):
    checkpoint = one_tensor(tmp_path, random_weights((300, 200), torch.bfloat16, 0))
    plan = plan_checkpoint(checkpoint, Recipe("fp8_tensor"))
    _, tally = run_plan(checkpoint, plan, slot_bytes=5000)
    assert tally.read_bytes == 2 * checkpoint.nbytes
    assert tally.placed_bytes == plan.final_bytes()


def test_a_kept_parameter_is_cast_to_the_dtype_of_the_model(tmp_path):
    weight = random_weights((30, 40), torch.float32, 0)
    checkpoint = one_tensor(tmp_path, weight)
    plan = make_plan(
        checkpoint, [Target("a", (30, 40), torch.bfloat16, "vector", (whole("a.weight", (30, 40)),))], Recipe()
    )
    storages, tally = run_plan(checkpoint, plan, slot_bytes=500)
    assert same_bytes(storages["a"].weight, weight.bfloat16())
    assert tally.read_bytes == weight.nbytes


def test_tensors_of_every_dtype_pass_through_bit_by_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float64, torch.float16):
        tensors[str(dtype)] = torch.randint(0, 100, (7, 9), generator=generator).to(dtype)
    tensors["e4m3"] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors["e5m2"] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    tensors["nan"] = torch.tensor([math.nan, math.inf, -0.0])
    tensors["bool"] = torch.tensor([True, False, True])
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 5)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    storages, _ = run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()), slot_bytes=64, threads=3)
    for name, tensor in tensors.items():
        assert same_bytes(storages[name].weight, tensor), name


@pytest.mark.parametrize("shape", [(0,), (0, 5), (0, 0), (1, 0), (5, 0), (2, 0, 3)])
def test_an_empty_tensor_passes_through(tmp_path, shape):
    checkpoint = one_tensor(tmp_path, torch.empty(shape, dtype=torch.bfloat16))
    storages, _ = run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()))
    assert storages["a.weight"].weight.shape == shape


def test_a_dtype_that_torch_lacks_is_carried_as_bytes(tmp_path):
    """F4 has two elements a byte: 3 x 8 of them are 12 bytes."""
    data = bytes(range(12))
    header = json.dumps({"a": {"dtype": "F4", "shape": [3, 8], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    checkpoint = Checkpoint.open(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    storages, _ = run_plan(checkpoint, plan)
    weight = storages["a"].weight
    assert weight.nbytes == plan.final_bytes() == 12
    assert bytes(weight.flatten().tolist()) == data


def test_sources_of_different_dtypes_make_one_parameter(tmp_path):
    a, b = random_weights((30, 40), torch.bfloat16, 0), random_weights((20, 40), torch.float32, 1)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"a": a, "b": b}))
    fused = torch.cat([Symbolic.source("a", a.shape, a.dtype), Symbolic.source("b", b.shape, b.dtype)])
    plan = make_plan(
        checkpoint, [Target("p", (50, 40), torch.bfloat16, kinds.LINEAR, tuple(fused.pieces))], Recipe("fp8_block")
    )
    storages, _ = run_plan(checkpoint, plan, slot_bytes=1 << 16)
    q, scale = schemes.quantize(torch.cat([a.float(), b]), "fp8_block", (30, 20))
    assert same_bytes(storages["p"].weight, q)
    assert same_bytes(storages["p"].scale, scale)


def test_a_tensor_may_fill_two_parameters(tmp_path):
    weight = random_weights((30, 40), torch.bfloat16, 0)
    checkpoint = one_tensor(tmp_path, weight)
    pieces = (whole("a.weight", (30, 40)),)
    targets = [
        Target(name, (30, 40), torch.bfloat16, kinds.LINEAR, pieces, keep=keep)
        for name, keep in (("x", None), ("y", "y"))
    ]
    storages, _ = run_plan(checkpoint, make_plan(checkpoint, targets, Recipe()))
    assert same_bytes(storages["x"].weight, schemes.quantize(weight, "fp8_channel")[0])
    assert same_bytes(storages["y"].weight, weight)


def test_a_plan_of_nothing_is_done_at_once(tmp_path):
    checkpoint = one_tensor(tmp_path, torch.ones(3))
    assert run_plan(checkpoint, make_plan(checkpoint, [], Recipe()))[0] == {}


def test_progress_ends_at_the_total(checkpoint):
    seen = []
    run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_ctrl_c_in_a_progress_callback_ends_threads_and_closes_files(checkpoint):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()), progress=interrupt, slot_bytes=1024)
    assert threads_of_octavo() == []


def test_a_failing_progress_callback_ends_a_stream_in_blocks(checkpoint, monkeypatch):
    plan, told = plan_checkpoint(checkpoint, Recipe()), []
    monkeypatch.setattr(importlib.import_module("octavo.streaming.stream"), "TICK_S", 0)  # after each block

    def fail(done: int, total: int) -> None:
        told.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(checkpoint, plan, budget=in_blocks(plan), progress=fail)
    assert len(told) == 1
    assert told[0] < plan.source_bytes
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo-")]


def test_a_sink_that_fails_ends_the_stream(checkpoint):
    class Full(ParameterSink):
        def open(self, placement, ring):
            if placement.scheme:
                raise OSError(28, "No space left on device")
            return super().open(placement, ring)

    plan = plan_checkpoint(checkpoint, Recipe())
    storages = {p.name: Storage.allocate(p) for p in plan.placements}
    with pytest.raises(CheckpointError, match="No space left") as raised:
        Stream(checkpoint, plan, Full(storages), threads=3).run()
    assert isinstance(raised.value.__cause__, OSError)


def test_a_stream_leaves_torchs_thread_count_as_it_was(checkpoint):
    """In the caller's thread, and in threads that are started later."""

    def counts() -> list[int]:
        found = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()))
        assert counts() == [3, 3]
    finally:
        torch.set_num_threads(before)


# -- weights that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_non_finite_weight_is_named_with_its_position(tmp_path, scheme, dtype, value):
    weight = random_weights((300, 200), dtype, 0)
    weight[177, 133] = value
    weight[290, 1] = value  # later
    checkpoint = one_tensor(tmp_path, weight)
    for slot_bytes in (1 << 20, 6000):
        with pytest.raises(WeightError) as caught:
            run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe(scheme)), threads=1, slot_bytes=slot_bytes)
        assert f"model.safetensors: tensor 'a.weight' holds {value} (at [177, 133])" in str(caught.value)
        assert "ignore=['a.weight']" in str(caught.value)


def test_a_non_finite_weight_of_a_transposed_stack_is_named(tmp_path):
    stack = random_weights((3, 40, 50), torch.bfloat16, 0)  # [experts, in, out]
    stack[2, 7, 9] = math.nan
    checkpoint = one_tensor(tmp_path, stack, "experts")
    wanted = Target("p", stack.shape, None, kinds.EXPERTS, (whole("experts", stack.shape),), transposed=True)
    with pytest.raises(WeightError, match=r"tensor 'experts' holds nan \(at \[2, 7, 9\]\), part of p"):
        run_plan(checkpoint, make_plan(checkpoint, [wanted], Recipe()), slot_bytes=1000)


def test_the_advice_for_a_non_finite_weight_works(tmp_path):
    weight = random_weights((30, 20), torch.bfloat16, 0)
    weight[0, 0] = math.nan
    checkpoint = one_tensor(tmp_path, weight)
    storages, _ = run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe(ignore=["a.weight"])))
    assert same_bytes(storages["a.weight"].weight, weight)


# -- sources that change ----------------------------------------------------------------------------------------------


class Meddler(ParameterSink):
    """Does something to the source when the second placement is opened, after reading has begun."""

    def __init__(self, plan: Plan, meddle) -> None:
        super().__init__({p.name: Storage.allocate(p) for p in plan.placements})
        self._meddle, self._opened = meddle, 0

    def open(self, placement, ring):
        self._opened += 1
        if self._opened == 2:
            deadline = time.monotonic() + 5
            while ring.done_bytes == 0 and time.monotonic() < deadline:
                time.sleep(0.001)
            self._meddle()
        return super().open(placement, ring)


@pytest.fixture
def two(tmp_path) -> Checkpoint:
    weights = {name: random_weights((64, 64), torch.bfloat16, 0) for name in ("a.weight", "b.weight")}
    return Checkpoint.open(write_checkpoint(tmp_path, weights))


def test_a_file_truncated_while_being_read_is_an_error(two):
    path, plan = two.shards[0].path, plan_checkpoint(two, Recipe())
    meddler = Meddler(plan, lambda: os.truncate(path, two.tensors["b.weight"].offset + 10))
    with pytest.raises(SourceChangedError, match=r"model\.safetensors: ended at byte"):
        Stream(two, plan, meddler, threads=2).run()


def test_a_file_written_to_while_being_read_is_an_error(two):
    path, plan = two.shards[0].path, plan_checkpoint(two, Recipe())
    with pytest.raises(SourceChangedError, match=r"model\.safetensors: changed since it was opened"):
        Stream(two, plan, Meddler(plan, lambda: os.utime(path, ns=(1, 1))), threads=2).run()


def test_a_file_replaced_between_opening_and_reading_is_an_error(two, tmp_path):
    plan = plan_checkpoint(two, Recipe())
    write_checkpoint(tmp_path, {"a.weight": torch.zeros(64, 64), "b.weight": torch.zeros(64, 64)})
    with pytest.raises(SourceChangedError, match="Run again when nothing writes to the checkpoint"):
        run_plan(two, plan)


@pytest.mark.parametrize("lanes", [0, 2])
def test_pieces_without_elements_do_no_harm_when_their_parameter_is_complete(tmp_path, lanes):
    sizes = {"a": 0, "b": 3, "c": 0, "d": 2, "e": 0}
    tensors = {name: random_weights((rows, 4), torch.bfloat16, rows) for name, rows in sizes.items()}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors, 5))
    with torch.no_grad():
        joined = [
            torch.cat([Symbolic.source(name, (sizes[name], 4), torch.bfloat16) for name in names])
            for names in (("a", "c"), ("b", "d", "e"))
        ]
    targets = [
        Target(name, tuple(made.shape), torch.bfloat16, kinds.LINEAR, tuple(made.pieces))
        for name, made in zip(("empty.weight", "filled.weight"), joined, strict=True)
    ]
    plan = make_plan(checkpoint, targets, Recipe(None))
    storages, _ = run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))
    assert storages["empty.weight"].weight.shape == (0, 4)
    assert same_bytes(storages["filled.weight"].weight, torch.cat([tensors["b"], tensors["d"]]))


# -- several devices --------------------------------------------------------------------------------------------------

#: both are this machine's memory, and two devices to torch
TWO = ("cpu", "cpu:0")


def spread(plan: Plan) -> Plan:
    """Every other placement on the second device."""
    placements = [replace(p, device=TWO[number % 2]) for number, p in enumerate(plan.placements)]
    return replace(plan, placements=tuple(placements))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("lanes", [0, 2])
def test_a_stream_to_two_devices_gives_the_bytes_of_one(tmp_path, scheme, lanes):
    tensors = {f"layers.{i}.up_proj.weight": random_weights((160, 320), torch.bfloat16, i) for i in range(7)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan = plan_checkpoint(checkpoint, Recipe(scheme))
    alone, read = run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))
    plan = spread(plan)
    apart, read_apart = run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes))
    for name, storage in alone.items():
        assert same_bytes(apart[name].weight, storage.weight)
        assert (storage.scale is None) == (apart[name].scale is None)
        assert storage.scale is None or same_bytes(apart[name].scale, storage.scale)
    assert (read_apart.read_bytes, read_apart.placed_bytes) == (read.read_bytes, read.placed_bytes)


def test_devices_take_turns_though_a_file_holds_one_part_after_the_other(tmp_path):
    tensors = {f"layers.{i}.weight": torch.zeros(64, 64) for i in range(12)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan = plan_checkpoint(checkpoint, Recipe(None))
    nbytes = 64 * 64 * 4
    # the second has twice as much
    placements = [replace(p, device=TWO[number >= 4]) for number, p in enumerate(plan.placements)]
    blocks = list(cut_in_turn(placements, checkpoint.tensors, nbytes))
    assert [b.device for b in blocks] == ["cpu", "cpu:0", "cpu:0"] * 4
    for device in TWO:
        mine = [placement for placement in placements if placement.device == device]
        assert [b for b in blocks if b.device == device] == list(cut_blocks(mine, checkpoint.tensors, nbytes))


def test_a_weight_that_is_not_finite_is_named_whichever_device_it_is_on(tmp_path):
    tensors = {f"layers.{i}.up_proj.weight": random_weights((64, 64), torch.bfloat16, i) for i in range(4)}
    tensors["layers.3.up_proj.weight"][5, 7] = math.nan
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan = spread(plan_checkpoint(checkpoint, Recipe("fp8_channel")))
    with pytest.raises(WeightError, match=r"'layers.3.up_proj.weight' holds nan \(at \[5, 7\]\)"):
        run_plan(checkpoint, plan, budget=in_blocks(plan))


def test_progress_goes_on_from_one_part_of_a_plan_to_the_next(checkpoint, monkeypatch):
    plan = plan_checkpoint(checkpoint, Recipe("fp8_channel"))
    half = len(plan.placements) // 2
    first, second = (replace(plan, placements=found) for found in (plan.placements[:half], plan.placements[half:]))
    monkeypatch.setattr(Plan, "parts", lambda self: [first, second] if self is plan else [self])
    storages, seen = {p.name: Storage.allocate(p) for p in plan.placements}, []
    tally = execute(checkpoint, plan, ParameterSink(storages), progress=lambda *found: seen.append(found))
    assert tally.placed_bytes == plan.final_bytes()
    assert seen[-1] == (plan.source_bytes, plan.source_bytes)
    assert (first.source_bytes, plan.source_bytes) in seen
    assert seen == sorted(seen)
