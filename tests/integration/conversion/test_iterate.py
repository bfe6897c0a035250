"""Iterating: `octavo.stream` yields what a conversion writes, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _sources import CONFIG, MIB, assert_same, by_case, by_scheme, expected, header_of, read_all, source_tensors

import octavo
from helpers import random_weights, same_bytes, threads_of_octavo, write_checkpoint
from octavo.errors import CheckpointError
from octavo.streaming import sinks

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")


@by_case
@pytest.mark.parametrize("layout", ["single", "sharded", "file"])
def test_stream_yields_what_convert_writes(
    sources: Callable[[str], Path], layout: str, format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources(layout), tmp_path / "out", scheme, format=format)
    pairs = list(octavo.stream(sources(layout), scheme, format=format))
    assert len(pairs) == len(dict(pairs))
    assert_same(dict(pairs), read_all(tmp_path / "out"))


def test_stream_keeps_file_order_and_a_scale_follows_its_weight(sources: Callable[[str], Path]) -> None:
    order = []
    for file in sorted(sources("sharded").glob("*.safetensors")):
        header, _ = header_of(file)
        entries = [(entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
        order += [name for _, name in sorted(entries)]
    wanted = []
    for name in order:
        wanted += [name, f"{name}_scale"] if name.endswith("_proj.weight") else [name]
    assert [name for name, _ in octavo.stream(sources("sharded"))] == wanted


@by_scheme
def test_stream_does_not_depend_on_threads_or_staging(sources: Callable[[str], Path], scheme: str) -> None:
    wanted = dict(octavo.stream(sources("sharded"), scheme))
    for threads, staging in [(1, MIB), (5, 2 * MIB)]:
        assert_same(dict(octavo.stream(sources("sharded"), scheme, threads=threads, staging_bytes=staging)), wanted)


def test_streamed_tensors_belong_to_the_caller(sources: Callable[[str], Path]) -> None:
    wanted = expected(source_tensors(), "compressed-tensors", "fp8_channel")
    kept = {}
    for name, tensor in octavo.stream(sources("single"), staging_bytes=MIB, threads=2):
        assert same_bytes(tensor, wanted[name])
        kept[name] = tensor.clone()
        tensor.view(torch.uint8).fill_(0xFF)  # does no harm to what comes
    assert_same(kept, wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_stream_runs_ahead_by_no_more_than_the_staging_budget(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{i:02d}.up_proj.weight": random_weights((512, 512), torch.bfloat16, i) for i in range(32)}
    source = write_checkpoint(tmp_path / "source", tensors, 2)
    allocated = 0
    original = sinks.Storage.allocate.__func__

    def allocate(cls: type[sinks.Storage], placement: Any) -> sinks.Storage:
        nonlocal allocated
        allocated += placement.final_bytes
        return original(cls, placement)

    monkeypatch.setattr(sinks.Storage, "allocate", classmethod(allocate))
    taken = 0
    for count, (_, tensor) in enumerate(octavo.stream(source, staging_bytes=MIB, threads=threads)):
        taken += tensor.nbytes
        if count % 16 == 0:
            _settle(lambda: allocated)
        # one pair has been handed out, and its scale may still be to come
        assert allocated - taken <= MIB + 4 * 512
    assert allocated == taken == 32 * (512 * 512 + 4 * 512)


def _settle(value: Callable[[], int]) -> None:
    """Wait until nothing happens any more: the reader has run as far ahead as it may."""
    for _ in range(50):
        before = value()
        time.sleep(0.02)
        if value() == before:
            return


def test_tensor_larger_than_the_staging_budget_is_streamed(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up_proj.weight": random_weights((1024, 2048), torch.bfloat16, i) for i in range(3)}
    source = write_checkpoint(tmp_path / "source", tensors)
    assert_same(
        dict(octavo.stream(source, "fp8_tensor", staging_bytes=MIB)),
        expected(tensors, "compressed-tensors", "fp8_tensor"),
    )


@pytest.mark.parametrize("after", [0, 1, 2, 9])
def test_stream_closed_early_ends_its_threads_and_closes_its_files(sources: Callable[[str], Path], after: int) -> None:
    iterator = octavo.stream(sources("sharded"), staging_bytes=MIB, threads=2)
    assert isinstance(iterator, Iterator)
    for _ in range(after):
        next(iterator)
    iterator.close()
    assert threads_of_octavo() == []


def test_stream_that_nobody_asks_starts_no_thread(sources: Callable[[str], Path]) -> None:
    iterator = octavo.stream(sources("sharded"))
    assert threads_of_octavo() == []
    del iterator


def test_error_in_the_consumer_ends_the_stream(sources: Callable[[str], Path]) -> None:
    def consume() -> None:
        for _ in octavo.stream(sources("sharded"), staging_bytes=MIB):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        consume()
    assert threads_of_octavo() == []


def test_stream_reports_progress_to_the_end(sources: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    list(octavo.stream(sources("single"), progress=lambda done, of: calls.append((done, of))))
    total = sum(tensor.nbytes for tensor in source_tensors().values())
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_stream_finds_what_headers_tell_before_the_first_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 3, CONFIG)
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        octavo.stream(source)
