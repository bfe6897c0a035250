"""Digests, compared while a checkpoint is read: in any parts, on any way, and more than once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

import octavo
from helpers import in_blocks, random_weights, run_plan, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.header import TensorInfo
from octavo.errors import CheckpointError
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.streaming.checks import Checks
from octavo.streaming.files import Files

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {
        "a.weight": random_weights((300, 128), torch.bfloat16, 0),
        "b.weight": random_weights((100, 200), torch.bfloat16, 1),
        "empty": torch.zeros(0, 3),
        "norm.bias": random_weights((77,), torch.float32, 2),
    }
    source = write_checkpoint(tmp_path / "source", tensors, 2)
    octavo.convert(source, tmp_path / "copy", None, digests=True)
    return Checkpoint.open(tmp_path / "copy")


def flip(checkpoint: Checkpoint, info: TensorInfo, byte: int) -> None:
    """Flip a bit without letting the system notice that the file was written to."""
    file = checkpoint.shards[info.shard].path
    raw = bytearray(file.read_bytes())
    raw[info.offset + byte] ^= 4
    file.write_bytes(raw)


def read(files: Files, info: TensorInfo, start: int, stop: int) -> None:
    files.read_into(info.shard, memoryview(bytearray(stop - start)), info.offset + start)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("scheme", [None, "fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "norm.bias"])
def test_a_stream_finds_a_flipped_bit_on_each_way(
    name: str, scheme: str | None, lanes: int, checkpoint: Checkpoint
) -> None:
    plan = plan_checkpoint(checkpoint, Recipe(scheme))
    run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes), checks=Checks(checkpoint))
    flip(checkpoint, checkpoint.tensors[name], 5)
    changed = Checkpoint.open(checkpoint.path)
    with pytest.raises(CheckpointError, match=f"tensor '{name}': the digest of its bytes is"):
        run_plan(changed, plan, budget=in_blocks(plan, lanes=lanes), checks=Checks(changed))


def test_the_rest_of_a_tensor_that_was_read_in_part_is_compared(checkpoint: Checkpoint) -> None:
    info = checkpoint.tensors["a.weight"]
    with contextlib.closing(Files.of(checkpoint, checks=Checks(checkpoint))) as files:
        read(files, info, 100, 5000)
        files.check_unchanged()
    flip(checkpoint, info, 6000)
    flip(checkpoint, checkpoint.tensors["b.weight"], 0)  # which is not read
    changed = Checkpoint.open(checkpoint.path)
    with contextlib.closing(Files.of(changed, checks=Checks(changed))) as files:
        read(files, info, 100, 5000)
        with pytest.raises(CheckpointError, match=r"copy/model-0000\d-of-00002\.safetensors: tensor 'a\.weight'"):
            files.check_unchanged()


def test_what_is_read_again_is_compared_again(checkpoint: Checkpoint) -> None:
    info = checkpoint.tensors["a.weight"]
    checks, right = Checks(checkpoint), bytearray(info.nbytes)
    with contextlib.closing(Files.of(checkpoint)) as files:
        files.read_into(info.shard, memoryview(right), info.offset)
    checks.add(info.shard, info.offset, memoryview(right))
    right[7] ^= 1  # as if the disk gave other bytes now
    checks.add(info.shard, info.offset, memoryview(right)[:1000])
    with pytest.raises(CheckpointError, match="the digest of its bytes"):
        checks.add(info.shard, info.offset + 1000, memoryview(right)[1000:])


def test_a_run_over_several_tensors_is_cut_where_they_meet(checkpoint: Checkpoint) -> None:
    with contextlib.closing(Files.of(checkpoint, checks=Checks(checkpoint))) as files:
        for number, shard in enumerate(checkpoint.shards):
            infos = [info for info in checkpoint.tensors.values() if info.shard == number]
            start = min(info.offset for info in infos)
            for at in range(0, shard.nbytes, 999):  # headers belong to no tensor
                files.read_into(number, memoryview(bytearray(min(999, shard.nbytes - at))), at)
            assert start > 0
        checks = files._checks
        assert checks is not None
        assert list(checks.rest()) == []
