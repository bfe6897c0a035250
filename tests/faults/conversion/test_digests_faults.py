"""Digests: the same however a conversion ran, and a flipped bit anywhere is found by them without a source."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _conversions import CONFIG, same_files, states, stop_after, tensors_of_size
from _inputs import fails
from safetensors import safe_open
from safetensors.torch import save_file

import octavo
from helpers import random_weights, write_checkpoint
from helpers.command import Run
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.digests import NAME
from octavo.errors import CheckpointError, OutputError

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

MIB = 1 << 20
SCHEMES = ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"]
WEIGHT, NORM = "a.up_proj.weight", "a.norm.weight"


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / NAME).read_text())
    return found


def by_zlib(folder: Path) -> dict[str, Any]:
    """The same file, made of the shards as they are, without octavo."""
    shards = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        base = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:base])
        header.pop("__metadata__")
        spans = {name: [base + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
        digests = {name: f"{zlib.crc32(raw[begin:end]):08x}" for name, (begin, end) in spans.items()}
        shards[file.name] = {"header": f"{zlib.crc32(raw[:base]):08x}", "tensors": digests}
    return {"algorithm": "crc32", "shards": shards}


def flip(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def convert(source: Path, dst: Path, scheme: str | None = "fp8_channel", **options: Any) -> None:
    octavo.convert(source, dst, scheme, **{"digests": True, **options})


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sides that no chunk fits, rows wider than a chunk, a stack that is kept, a tensor without elements."""
    tensors = {
        WEIGHT: random_weights((700, 331), torch.bfloat16, 0),
        "b.up_proj.weight": random_weights((3, 90_016), torch.bfloat16, 1),
        "c.up_proj.weight": random_weights((256, 1500), torch.float32, 2),
        "d.experts.up_proj": random_weights((3, 70, 90), torch.bfloat16, 3),
        NORM: random_weights((331,), torch.float32, 4),
        "empty": torch.zeros(0, 7),
        "position": torch.arange(5),
    }
    return write_checkpoint(tmp_path_factory.mktemp("odd") / "source", tensors, 2, CONFIG)


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
def test_digests_are_those_of_the_bytes_however_they_were_written(
    scheme: str | None, odd: Path, tmp_path: Path
) -> None:
    convert(odd, tmp_path / "out", scheme)
    assert recorded(tmp_path / "out") == by_zlib(tmp_path / "out")
    for number, (threads, staging) in enumerate([(1, MIB), (5, MIB), (3, 1_234_567), (2, 64 * MIB)]):
        again = tmp_path / str(number)
        convert(odd, again, scheme, threads=threads, staging_bytes=staging)
        assert same_files(tmp_path / "out", again)
        report = octavo.verify(again, threads=threads, staging_bytes=staging)
        assert report.ok
        assert report.by_digests


def test_a_conversion_that_is_resumed_has_the_digests_of_one_that_was_not(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(3, 512), 3, CONFIG)
    convert(source, tmp_path / "whole")
    stop_after(1, source, tmp_path / "out", digests=True, threads=1, staging_bytes=MIB)
    convert(source, tmp_path / "out")
    assert same_files(tmp_path / "whole", tmp_path / "out")
    assert recorded(tmp_path / "out") == by_zlib(tmp_path / "out")


@pytest.mark.parametrize("first", [True, False])
def test_digests_may_be_asked_for_or_not_when_a_conversion_is_resumed(first: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(3, 512), 3, CONFIG)
    stop_after(1, source, tmp_path / "out", digests=first, threads=1, staging_bytes=MIB)
    convert(source, tmp_path / "out", digests=not first)
    assert (tmp_path / "out" / NAME).exists() is not first
    if not first:
        assert recorded(tmp_path / "out") == by_zlib(tmp_path / "out")


@pytest.mark.parametrize("digests", [[], "none", {"model-00001-of-00003.safetensors": []}])
def test_a_manifest_with_other_digests_is_damaged(digests: Any, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(3, 512), 3, CONFIG)
    stop_after(1, source, tmp_path / "out", digests=True, threads=1, staging_bytes=MIB)
    manifest = tmp_path / "out.partial" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "digests": digests}))
    fails(OutputError, "damaged", lambda: convert(source, tmp_path / "out"))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_without_a_source_finds_one_flipped_bit(scheme: str, tmp_path: Path) -> None:
    tensors = {WEIGHT: random_weights((70, 96), torch.bfloat16, 0), NORM: random_weights((96,), torch.bfloat16, 1)}
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "source", tensors, 1, CONFIG), out, scheme)
    file = out / "model.safetensors"
    raw = file.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:base])
    for name in (WEIGHT, f"{WEIGHT}_scale", NORM):
        begin, end = (8 * (base + offset) for offset in header[name]["data_offsets"])
        for bit in (begin, begin + 7, (begin + end) // 2, end - 1):
            flip(file, bit)
            report = octavo.verify(out)
            assert [(result.name, result.differing_bytes) for result in report.different] == [(name, None)]
            assert json.loads(json.dumps(report.to_dict()))["ok"] is False
            flip(file, bit)
    assert octavo.verify(out).ok


def test_a_flipped_bit_of_a_header_is_found(tmp_path: Path) -> None:
    tensors = {WEIGHT: random_weights((32, 32), torch.bfloat16, 0), "empty": torch.zeros(0, 5)}
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "source", tensors, 1, CONFIG), out)
    file = out / "model.safetensors"
    for bit in range(0, 8 * (8 + int.from_bytes(file.read_bytes()[:8], "little")), 9):
        flip(file, bit)
        with pytest.raises(CheckpointError):
            octavo.verify(out, threads=1)
        flip(file, bit)


def test_what_is_missing_from_or_new_in_a_checkpoint_is_named(odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(odd, out, None)
    first, second = sorted(file.name for file in out.glob("*.safetensors"))
    digests = recorded(out)

    def record(change: Callable[[dict[str, Any]], Any]) -> None:
        changed = json.loads(json.dumps(digests))
        change(changed)
        (out / NAME).write_text(json.dumps(changed))

    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda d: d["shards"].pop(second), f"{second}: no digests of it"),
        (lambda d: d["shards"].update(other={}), "other: gone"),
        (lambda d: d["shards"][first]["tensors"].update(alien="0"), "tensor 'alien' is gone"),
        (lambda d: d["shards"][first]["tensors"].popitem(), "has no digest"),
        (lambda d: d["shards"][first].update(header="00000000"), f"{first}: its header is not the one"),
        (lambda d: d["shards"][first].update(tensors=[]), f"{first}: no digests of it"),
        (lambda d: d.update(algorithm="md5"), "not what octavo writes"),
        (lambda d: d.update(shards=7), "not what octavo writes"),
    ]
    for change, says in cases:
        record(change)
        fails(CheckpointError, says, lambda: octavo.verify(out))
    (out / NAME).write_text("{")
    fails(CheckpointError, "not valid JSON", lambda: octavo.verify(out))
    (out / NAME).unlink()
    fails(CheckpointError, f"has no {NAME}", lambda: octavo.verify(out))
    fails(CheckpointError, f"has no {NAME}", lambda: octavo.stream(out, None, verify=True))


def test_a_shard_without_tensors_is_not_missed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(2, 64), 2, CONFIG)
    (source / "model.safetensors.index.json").unlink()
    save_file({}, source / "model-00002-of-00002.safetensors")
    convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out").ok
    assert octavo.verify(tmp_path / "out", source).ok


def test_digests_are_not_copied_from_the_source(tmp_path: Path) -> None:
    tensors = {WEIGHT: random_weights((32, 32), torch.bfloat16, 0)}
    convert(write_checkpoint(tmp_path / "source", tensors, 1, CONFIG), tmp_path / "copy", None)
    convert(tmp_path / "copy", tmp_path / "none", digests=False)
    convert(tmp_path / "copy", tmp_path / "own")
    assert not (tmp_path / "none" / NAME).exists()
    assert recorded(tmp_path / "own") == by_zlib(tmp_path / "own")


# -- while they stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("scheme", [None, "fp8_channel", "fp8_tensor"])
def test_a_stream_that_verifies_hands_out_no_tensor_that_was_damaged(
    scheme: str | None, threads: int, odd: Path, tmp_path: Path
) -> None:
    convert(odd, tmp_path / "copy", None)
    options: dict[str, Any] = {"verify": True, "threads": threads, "staging_bytes": 2 * MIB}
    wanted = [name for name, _ in octavo.stream(odd, scheme, staging_bytes=2 * MIB)]
    assert [name for name, _ in octavo.stream(tmp_path / "copy", scheme, **options)] == wanted
    for file in sorted((tmp_path / "copy").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            bad = list(opened.offset_keys())[-1]
        flip(file, -5)
        seen: list[str] = []
        says = (str(file), f"tensor {bad!r}: the digest of its bytes is", "when they were written")

        def hand_out(names: list[str] = seen) -> None:
            names.extend(name for name, _ in octavo.stream(tmp_path / "copy", scheme, **options))

        fails(CheckpointError, says, hand_out)
        assert bad not in seen
        says = (str(file), f"tensor {bad!r}: the digest")
        fails(CheckpointError, says, lambda: convert(tmp_path / "copy", tmp_path / "out", scheme, verify=True))
        assert not (tmp_path / "out").exists()
        flip(file, -5)


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_conversion_that_verifies_keeps_only_what_was_verified(first: bool, tmp_path: Path) -> None:
    """A shard that an earlier run had finished from damaged bytes, unseen, is not passed on as verified."""
    made_from = write_checkpoint(tmp_path / "made_from", tensors_of_size(3, 512), 3, CONFIG)
    source, out = tmp_path / "source", tmp_path / "out"
    convert(made_from, source, None)
    bit = 8 * (source / "model-00001-of-00003.safetensors").stat().st_size - 1
    if not first:
        flip(source / "model-00001-of-00003.safetensors", bit)
    stop_after(1, source, out, verify=first, threads=1, staging_bytes=MIB)
    before = states(tmp_path / "out.partial" / "checkpoint")
    if first:
        octavo.convert(source, out, verify=True)
        assert before.items() <= states(out).items()
    else:
        fails(CheckpointError, "the digest of its bytes", lambda: octavo.convert(source, out, verify=True))
        assert not out.exists()


def test_a_converted_checkpoint_is_handed_out_verified(odd: Path, tmp_path: Path) -> None:
    convert(odd, tmp_path / "out")
    seen = dict(octavo.stream(tmp_path / "out", None, verify=True))
    names = {name for shard in recorded(tmp_path / "out")["shards"].values() for name in shard["tensors"]}
    scales = {name for name in names if name.endswith("_scale")}
    assert seen.keys() == names - scales  # with which weights are decoded
    info = Checkpoint.open(tmp_path / "out").tensors[min(scales)]
    file = Checkpoint.open(tmp_path / "out").shards[info.shard].path
    flip(file, 8 * info.offset)
    fails(
        CheckpointError,
        (str(file), f"tensor {info.name!r}: the digest"),
        lambda: dict(octavo.stream(tmp_path / "out", None, verify=True)),
    )


def test_the_command_says_what_it_compared(tmp_path: Path, run: Run) -> None:
    tensors = {WEIGHT: random_weights((32, 32), torch.bfloat16, 0)}
    out = tmp_path / "out"
    convert(write_checkpoint(tmp_path / "source", tensors, 1, CONFIG), out)
    flip(out / "model.safetensors", -1)
    different = run("verify", out)
    assert (different.code, different.err) == (1, "")
    assert f"{WEIGHT}  not the bytes that were written" in different.out
    assert "DIFFERENT: 1 of 2 tensors (by their digests; no source was read)" in different.out
