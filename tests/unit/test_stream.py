"""Streams on real files: parameters, the iterator, weights that are not finite, sources that change."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from helpers import DTYPES, SCHEMES, random_weights, run_plan, same_bytes, threads_of_octavo, write_checkpoint
from octavo import kinds, schemes
from octavo.checkpoint import Checkpoint
from octavo.errors import DeviceError, SourceChangedError, WeightError
from octavo.files import Files
from octavo.geometry import Geometry
from octavo.pieces import Symbolic, whole
from octavo.plan import Plan, Target, make_plan, plan_checkpoint
from octavo.recipe import Recipe
from octavo.sinks import IteratorSink, ParameterSink, Storage
from octavo.stream import Stream, Worker

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(60)]

LAYER = "model.layers.0"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": random_weights((50, 96), torch.bfloat16, 0),
        f"{LAYER}.self_attn.q_proj.weight": random_weights((200, 96), torch.bfloat16, 1),
        f"{LAYER}.mlp.down_proj.weight": random_weights((96, 300), torch.float16, 2),
        f"{LAYER}.mlp.up_proj.weight": random_weights((300, 96), torch.float32, 3),
        f"{LAYER}.mlp.up_proj.bias": random_weights((300,), torch.float32, 4),
        "model.norm.weight": random_weights((96,), torch.bfloat16, 5),
    }


@pytest.fixture
def checkpoint(tmp_path, tensors) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path, tensors, shards=2))


def one_tensor(tmp_path, tensor: torch.Tensor, name: str = "a.weight") -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path, {name: tensor}))


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
    geometry = dataclasses.replace(Geometry.fit(plan, 3, 1 << 15), lanes=lanes, block_bytes=1 << 17)
    with torch.device("meta"):
        storages, _ = run_plan(checkpoint, plan, geometry=geometry)
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


def test_a_sink_that_fails_ends_the_stream(checkpoint):
    class Full(ParameterSink):
        def open(self, placement, ring):
            if placement.scheme:
                raise OSError(28, "No space left on device")
            return super().open(placement, ring)

    plan = plan_checkpoint(checkpoint, Recipe())
    storages = {p.name: Storage.allocate(p) for p in plan.placements}
    with pytest.raises(OSError, match="No space left"):
        Stream(checkpoint, plan, Full(storages), threads=3).run()


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


# -- the iterator -----------------------------------------------------------------------------------------------------


def iterate(checkpoint: Checkpoint, plan: Plan, sink: IteratorSink, **options) -> Iterator[tuple[str, Storage]]:
    with closing(Stream(checkpoint, plan, sink, **options).iterate()) as placed:
        for placement, storage in placed:
            yield placement.name, storage


def many(tmp_path, count: int = 12) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    tensors = {f"{i:02d}.weight": random_weights((128, 128), torch.bfloat16, i) for i in range(count)}
    return Checkpoint.open(write_checkpoint(tmp_path, tensors, shards=3)), tensors


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead_bytes", [0, 40_000, 1 << 30])
def test_the_iterator_yields_finished_tensors_in_plan_order(tmp_path, threads, ahead_bytes):
    checkpoint, tensors = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe("fp8_tensor"))
    names = []
    for name, storage in iterate(checkpoint, plan, IteratorSink(ahead_bytes), threads=threads, slot_bytes=9000):
        q, scale = schemes.quantize(tensors[name], "fp8_tensor")
        assert same_bytes(storage.weight, q)
        assert same_bytes(storage.scale, scale)
        names.append(name)
    assert names == [placement.name for placement in plan.placements]


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_the_iterator_early_ends_threads_and_closes_files(tmp_path, taken):
    checkpoint, _ = many(tmp_path)
    iterator = iterate(checkpoint, plan_checkpoint(checkpoint, Recipe()), IteratorSink(0), threads=3)
    for _ in range(taken):
        next(iterator)
    iterator.close()
    assert threads_of_octavo() == []


def test_the_iterator_runs_ahead_by_no_more_than_it_may(tmp_path):
    checkpoint, _ = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    size = plan.placements[0].final_bytes
    opened = []

    class Watched(IteratorSink):
        def open(self, placement, ring):
            destination = super().open(placement, ring)
            opened.append(placement.name)
            return destination

    with closing(iterate(checkpoint, plan, Watched(3 * size + 1), threads=4)) as iterator:
        for handed_out in range(1, 6):
            next(iterator)
            time.sleep(0.1)
            assert len(opened) == handed_out + 2  # with the one that the consumer holds, three are there


def test_a_tensor_that_the_consumer_dropped_is_freed_while_the_stream_goes_on(tmp_path):
    checkpoint, _ = many(tmp_path)
    with closing(iterate(checkpoint, plan_checkpoint(checkpoint, Recipe()), IteratorSink(1 << 20))) as iterator:
        _, storage = next(iterator)
        watched = weakref.ref(storage.weight)
        del storage
        next(iterator)
        gc.collect()
        assert watched() is None


def test_an_error_in_a_worker_reaches_the_consumer_after_what_was_finished_before(tmp_path):
    tensors = {f"{i:02d}.weight": random_weights((64, 64), torch.bfloat16, i) for i in range(6)}
    tensors["03.weight"][5, 6] = math.nan
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    iterator = iterate(checkpoint, plan_checkpoint(checkpoint, Recipe()), IteratorSink(1 << 30), threads=2)
    names = []
    with pytest.raises(WeightError, match=r"tensor '03\.weight' holds nan \(at \[5, 6\]"):
        names.extend(name for name, _ in iterator)
    assert names == ["00.weight", "01.weight", "02.weight"][: len(names)]


@pytest.mark.parametrize("lanes", [0, 2])
def test_an_iterator_that_fails_in_its_own_way_leaves_files_and_torch_as_they_were(checkpoint, monkeypatch, lanes):
    def read_into(*_: object) -> None:
        raise MemoryError("no room to read into")

    monkeypatch.setattr(Files, "read_into", read_into)
    plan = plan_checkpoint(checkpoint, Recipe())
    geometry = dataclasses.replace(Geometry.fit(plan, 3, 1 << 15), lanes=lanes, block_bytes=1 << 17)
    stream = Stream(checkpoint, plan, IteratorSink(1 << 30), geometry=geometry)
    stream.files._open(0)  # as a thread before the one that fails
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(MemoryError, match="no room"):
            list(stream.iterate())
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_worker_comes_without_the_rings_own_exceptions(tmp_path, monkeypatch):
    """What stops the consumer's waiting is an implementation detail: it has no place in a user's traceback."""
    monkeypatch.setattr(Worker, "close", lambda self: time.sleep(0.3))  # the consumer wakes first
    weight = random_weights((64, 64), torch.bfloat16, 0)
    weight[5, 6] = math.nan
    checkpoint = one_tensor(tmp_path, weight)
    with pytest.raises(WeightError) as caught:
        list(iterate(checkpoint, plan_checkpoint(checkpoint, Recipe()), IteratorSink(1 << 30)))
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# -- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging_bytes", [1 << 20, 3 << 20, 10 << 20, 256 << 20])
@pytest.mark.parametrize("threads", [None, 1, 16])
def test_the_staging_budget_holds_all_that_threads_own(checkpoint, staging_bytes, threads):
    for device in ("cpu", "cuda:0"):
        geometry = Geometry.fit(plan_checkpoint(checkpoint, Recipe(), staging_bytes, device), threads)
        assert geometry.device == torch.device(device)
        assert geometry.staging_bytes <= staging_bytes
        assert geometry.threads == threads or (threads is None and geometry.threads >= 1)
        assert geometry.slot_bytes >= 1 << 12


def test_a_worker_takes_no_more_memory_than_its_geometry_says(checkpoint):
    plan = plan_checkpoint(checkpoint, Recipe(), 2 << 20)
    stream = Stream(checkpoint, plan, ParameterSink({}), threads=1)
    made = []
    thread = threading.Thread(target=lambda: made.append(Worker(stream)))
    thread.start()
    thread.join()
    (worker,) = made
    owned = [worker.slot.buffer]
    owned += [tensor for tensor in vars(worker.press).values() if isinstance(tensor, torch.Tensor)]
    for_output = stream.geometry.slot_bytes // 2  # taken when first needed
    assert sum(tensor.nbytes for tensor in owned) + for_output == stream.geometry.host_bytes <= 2 << 20


def test_a_budget_that_is_too_small_is_an_error(checkpoint):
    plan = plan_checkpoint(checkpoint, Recipe(), 1000)
    with pytest.raises(DeviceError, match=r"staging_bytes is 1,000; at least 1,048,576 \(1 MiB\) are needed"):
        Stream(checkpoint, plan, ParameterSink({}))


def test_no_threads_are_an_error(checkpoint):
    with pytest.raises(DeviceError, match="threads is 0; at least 1 is needed"):
        Stream(checkpoint, plan_checkpoint(checkpoint, Recipe()), ParameterSink({}), threads=0)


def test_direct_reads_to_a_cpu_are_an_error(checkpoint):
    with pytest.raises(DeviceError, match="direct_io=True is for loading to an accelerator"):
        Stream(checkpoint, plan_checkpoint(checkpoint, Recipe()), ParameterSink({}), direct_io=True)


# -- in blocks, as on an accelerator ----------------------------------------------------------------------------------


def in_blocks(plan: Plan, block_bytes: int = 1 << 16) -> Geometry:
    return dataclasses.replace(Geometry.fit(plan, 3, 1 << 15), lanes=2, block_bytes=block_bytes)


def test_blocks_are_iterated_over_in_plan_order(tmp_path):
    checkpoint, tensors = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    found = dict(iterate(checkpoint, plan, IteratorSink(None), geometry=in_blocks(plan)))
    assert list(found) == [placement.name for placement in plan.placements]
    for name, storage in found.items():
        q, scale = schemes.quantize(tensors[name], "fp8_channel")
        assert same_bytes(storage.weight, q)
        assert same_bytes(storage.scale, scale)


@pytest.mark.parametrize("lanes", [0, 2])
def test_what_stays_is_iterated_over_between_what_is_quantized(tmp_path, lanes):
    tensors = {}
    for i in range(6):
        tensors[f"{i}.a.weight"] = random_weights((64, 64), torch.bfloat16, i)
        tensors[f"{i}.b.bias"] = random_weights((64,), torch.bfloat16, i)
        tensors[f"{i}.c.weight"] = random_weights((64, 64), torch.bfloat16, i + 10)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan = plan_checkpoint(checkpoint, Recipe())
    geometry = dataclasses.replace(in_blocks(plan), lanes=lanes)
    placed = iterate(checkpoint, plan, IteratorSink(None), geometry=geometry)
    assert [name for name, _ in placed] == list(tensors)


def test_nothing_that_is_not_finite_is_handed_out_of_a_block(tmp_path):
    tensors = {f"{i:02d}.weight": random_weights((128, 128), torch.bfloat16, i) for i in range(12)}
    tensors["07.weight"][3, 4] = math.nan
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan, seen = plan_checkpoint(checkpoint, Recipe()), []
    placed = iterate(checkpoint, plan, IteratorSink(None), geometry=in_blocks(plan))
    with pytest.raises(WeightError, match=r"'07\.weight' holds nan \(at \[3, 4\]\)"):
        seen.extend(placed)
    assert all(bool(torch.isfinite(storage.scale).all()) for _, storage in seen)
    assert "07.weight" not in dict(seen)


def test_closing_early_does_not_tell_what_reading_ahead_found(tmp_path):
    checkpoint, _ = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    iterator = iterate(checkpoint, plan, IteratorSink(None), geometry=in_blocks(plan))
    next(iterator)
    for shard in checkpoint.shards[1:]:
        shard.path.unlink()
    time.sleep(0.2)
    iterator.close()


def test_a_failing_progress_callback_ends_a_stream_in_blocks(tmp_path):
    checkpoint, _ = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(checkpoint, plan, geometry=in_blocks(plan), progress=fail)


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
@pytest.mark.parametrize("staging_bytes", [1 << 20, 3 << 20, 24 << 20, 100 << 20, 192 << 20, 256 << 20])
@pytest.mark.parametrize("threads", [None, 1, 40])
def test_what_an_accelerator_takes_is_within_the_budget(tmp_path, scheme, staging_bytes, threads):
    checkpoint = one_tensor(tmp_path, random_weights((64, 64), torch.bfloat16, 0))
    plan = plan_checkpoint(checkpoint, Recipe(scheme), staging_bytes, "cuda:0")
    for handing_out in (False, True):
        fit = Geometry.fit(plan, threads, handing_out=handing_out)
        assert fit.slots * fit.slot_bytes == fit.host_bytes <= staging_bytes
        assert fit.lanes * fit.lane_bytes == fit.device_bytes <= staging_bytes
        outstanding = fit.block_bytes if handing_out else 0
        assert fit.device_bytes + outstanding <= staging_bytes
        assert fit.block_bytes * (2.2 if scheme == "mxfp8" else 1.27) <= fit.lane_bytes
        assert not fit.block_bytes % fit.read_bytes  # no block ends with a small read
