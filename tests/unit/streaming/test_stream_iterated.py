"""Streams that are iterated over, in chunks and in blocks: plan order, bounded memory, errors that reach consumers."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from helpers import in_blocks, one_tensor, random_weights, same_bytes, threads_of_octavo, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import DeviceError, WeightError
from octavo.numerics import schemes
from octavo.planning.plan import Plan, plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.streaming.files import Files
from octavo.streaming.sinks import IteratorSink, Storage
from octavo.streaming.stream import Stream, Worker

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(60)]


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
    stream = Stream(checkpoint, plan, IteratorSink(1 << 30), budget=in_blocks(plan, lanes=lanes, block_bytes=1 << 17))
    stream.files._open(0)  # as a thread before the one that fails
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(DeviceError, match="no room"):
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


# -- in blocks, as on an accelerator ----------------------------------------------------------------------------------


def test_blocks_are_iterated_over_in_plan_order(tmp_path):
    checkpoint, tensors = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    found = dict(iterate(checkpoint, plan, IteratorSink(None), budget=in_blocks(plan)))
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
    placed = iterate(checkpoint, plan, IteratorSink(None), budget=in_blocks(plan, lanes=lanes))
    assert [name for name, _ in placed] == list(tensors)


def test_nothing_that_is_not_finite_is_handed_out_of_a_block(tmp_path):
    tensors = {f"{i:02d}.weight": random_weights((128, 128), torch.bfloat16, i) for i in range(12)}
    tensors["07.weight"][3, 4] = math.nan
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan, seen = plan_checkpoint(checkpoint, Recipe()), []
    placed = iterate(checkpoint, plan, IteratorSink(None), budget=in_blocks(plan))
    with pytest.raises(WeightError, match=r"'07\.weight' holds nan \(at \[3, 4\]\)"):
        seen.extend(placed)
    assert all(bool(torch.isfinite(storage.scale).all()) for _, storage in seen)
    assert "07.weight" not in dict(seen)


def test_closing_early_does_not_tell_what_reading_ahead_found(tmp_path):
    checkpoint, _ = many(tmp_path)
    plan = plan_checkpoint(checkpoint, Recipe())
    iterator = iterate(checkpoint, plan, IteratorSink(None), budget=in_blocks(plan))
    next(iterator)
    for shard in checkpoint.shards[1:]:
        shard.path.unlink()
    time.sleep(0.2)
    iterator.close()
