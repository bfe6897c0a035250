"""`octavo.verify` finds what is wrong with a conversion, down to a bit."""

from __future__ import annotations

import errno
import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _conversions import CONFIG, tensors_of_size
from _inputs import edit_config, fails
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from helpers import random_weights, threads_of_octavo, write_checkpoint
from helpers.command import Run, refused
from helpers.folders import edit_tensors
from octavo.errors import CheckpointError, SourceChangedError

CASES = [
    ("compressed-tensors", "fp8_channel"),
    ("compressed-tensors", "fp8_block"),
    ("compressed-tensors", "fp8_tensor"),
    ("compressed-tensors", "mxfp8"),
    ("fp8", "fp8_block"),
]
_WEIGHT = "model.layers.1.mlp.down_proj.weight"


def _flip(folder: Path, name: str, bit: int) -> None:
    """Flip one bit of a tensor's bytes on disk; ``bit`` counts from its end if negative."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8 : 8 + length]).get(name)
        if entry:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            position = (8 * begin if bit >= 0 else 8 * end) + bit
            raw[position // 8] ^= 1 << position % 8
            file.write_bytes(raw)
            return
    raise AssertionError(f"{name} is in none of the files")


@pytest.mark.parametrize(("format", "scheme"), CASES)
@pytest.mark.parametrize(
    "what",
    [
        "weight",
        "scale",
        "kept",
    ],
)
def test_verify_finds_one_flipped_bit(format: str, scheme: str, what: str, small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out", scheme, format=format)
    suffix = "_scale" if format == "compressed-tensors" else "_scale_inv"
    name = {"weight": _WEIGHT, "scale": _WEIGHT + suffix, "kept": "model.layers.1.input_layernorm.weight"}[what]
    bits = range(8) if what == "scale" and scheme == "mxfp8" else (0, 7, -1, -2)
    for bit in bits:
        _flip(tmp_path / "out", name, bit)
        report = octavo.verify(tmp_path / "out", small)
        assert not report.ok
        (different,) = report.different
        assert different.name == (_WEIGHT if what == "scale" else name)
        assert different.differing_bytes == 1
        json.dumps(report.to_dict(), allow_nan=False)
        _flip(tmp_path / "out", name, bit)
    assert octavo.verify(tmp_path / "out", small).ok


def test_verify_finds_flipped_bits_in_the_last_block_of_a_large_tensor(tmp_path: Path) -> None:
    tensors = {"a.up_proj.weight": random_weights((700, 300), torch.bfloat16, 0)}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    for scheme in ("fp8_channel", "fp8_block", "fp8_tensor"):
        octavo.convert(source, tmp_path / scheme, scheme)
        for name in ("a.up_proj.weight", "a.up_proj.weight_scale"):
            _flip(tmp_path / scheme, name, -9)
            report = octavo.verify(tmp_path / scheme, source, staging_bytes=1 << 20, threads=2)
            assert [result.differing_bytes for result in report.tensors] == [1]
            _flip(tmp_path / scheme, name, -9)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("which", ["out", "source"])
@pytest.mark.parametrize("what", ["weight", "kept"])
def test_verify_names_the_tensor_where_a_file_is_cut_off_meanwhile(
    which: str, what: str, scheme: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"weight": "a.up_proj.weight", "kept": "norm.weight"}[what]
    shape = (400, 500) if what == "weight" else (200_000,)
    source = write_checkpoint(tmp_path / "source", {name: random_weights(shape, torch.bfloat16, 0)}, 1, CONFIG)
    octavo.convert(source, tmp_path / "out", scheme)
    file, real, reads = tmp_path / which / "model.safetensors", os.preadv, itertools.count()
    nbytes, left = file.stat().st_size, file.stat().st_size // 2 + 1

    def preadv(descriptor: int, *arguments: Any) -> int:
        if os.path.samestat(os.fstat(descriptor), file.stat()) and next(reads) == 1:
            os.truncate(file, left)
        return real(descriptor, *arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    says = (str(file), f"ended at byte {left:,}", f"tensor '{name}': bytes ", f"it was {nbytes:,} bytes long")
    verify = functools.partial(octavo.verify, tmp_path / "out", source, staging_bytes=1 << 20, threads=threads)
    fails(SourceChangedError, says, verify)
    assert threads_of_octavo() == []


def test_verify_names_the_tensor_where_a_disk_fails(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.convert(small, tmp_path / "out")

    def preadv(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    says = ("out/model-00001-of-00003.safetensors", "(tensor 'model.", "failed: Input/output error")
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", small, threads=1))


def test_verify_finds_a_source_that_changes_without_an_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.convert(small, tmp_path / "out")
    first = sorted(small.glob("*.safetensors"))[0]

    def progress(done: int, of: int) -> None:
        if done == of:
            os.utime(first, ns=(1, 1))

    says = (str(first), "changed since it was opened")
    fails(SourceChangedError, says, lambda: octavo.verify(tmp_path / "out", small, progress=progress))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(lambda t: t.pop(_WEIGHT), f"{_WEIGHT}: in ", id="no weight"),
        pytest.param(lambda t: t.pop(f"{_WEIGHT}_scale"), f"{_WEIGHT} is F8_E4M3, but has no scale", id="no scale"),
        pytest.param(
            lambda t: t.pop("model.layers.0.input_layernorm.weight"),
            "model.layers.0.input_layernorm.weight",
            id="no norm",
        ),
        pytest.param(lambda t: t.update(alien=torch.ones(1)), "alien: not in", id="one too many"),
        pytest.param(
            lambda t: t.update({f"{_WEIGHT}_scale": torch.ones(7, 1)}),
            "a scale [7, 1] (fp32)",
            id="scale of another shape",
        ),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT][:5].clone()}), "[5, 96] here, [96, 96] there", id="shape"),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT].flatten()}), "[9216] here, [96, 96] there", id="axes"),
        pytest.param(
            lambda t: t.update({"model.layers.0.input_layernorm.weight_scale": torch.ones(1)}),
            "model.layers.0.input_layernorm.weight_scale",
            id="a scale of what is not quantized",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.ones(96, dtype=torch.float8_e4m3fn)}),
            "input_layernorm.weight: F8_E4M3 here, BF16 there, which octavo does not quantize",
            id="FP8 without rows",
        ),
        pytest.param(
            lambda t: t.update({_WEIGHT: t[_WEIGHT].view(torch.uint8)}),
            "is of no scheme that octavo writes",
            id="weight in uint8",
        ),
    ],
)
def test_verify_names_what_is_missing_or_misshapen(
    edit: Callable[[dict[str, Tensor]], Any], says: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(2, 96), 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    edit_tensors(tmp_path / "out", edit)
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", source))


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t.update({f"{_WEIGHT}_scale": t[f"{_WEIGHT}_scale"].bfloat16()}), id="scale in bf16"),
        pytest.param(lambda t: t.update({_WEIGHT: t[_WEIGHT].view(torch.float8_e5m2)}), id="weight in e5m2"),
    ],
)
def test_verify_finds_tensors_of_another_dtype(edit: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tensors_of_size(2, 96), 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    edit_tensors(tmp_path / "out", edit)
    assert [result.name for result in octavo.verify(tmp_path / "out", source).different] == [_WEIGHT]


def test_verify_finds_a_config_that_does_not_tell_of_fp8(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    fails(CheckpointError, "no quantization_config", lambda: octavo.verify(tmp_path / "out", small))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (["fp8"], "must be an object"),
        ({"quant_method": ["fp8"]}, "must be a text"),
        ({}, "which octavo does not write"),
        ({"quant_method": "awq"}, "which octavo does not write"),
    ],
)
def test_verify_refuses_a_quantization_config_that_octavo_does_not_write(
    config: Any, says: str, small: Path, tmp_path: Path
) -> None:
    octavo.convert(small, tmp_path / "out")
    edit_config(tmp_path / "out", quantization_config=config)
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", small))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.safetensors", "holds two checkpoints, model.safetensors and model.safetensors.index.json"),
        ("alien.safetensors", "alien.safetensors: belongs to no shard of this checkpoint"),
        (
            "model-00004-of-00003.safetensors",
            "model-00004-of-00003.safetensors: belongs to no shard of this checkpoint",
        ),
    ],
)
def test_verify_names_a_shard_too_many(name: str, says: str, small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    save_file({"alien": torch.ones(1)}, tmp_path / "out" / name)
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", small))


def test_verify_names_a_shard_that_is_missing(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00003.safetensors").unlink()
    says = "names model-00002-of-00003.safetensors, which is not in the folder"
    fails(CheckpointError, says, lambda: octavo.verify(tmp_path / "out", small))


def test_verify_compares_numbers_that_are_none_by_their_bits(tmp_path: Path) -> None:
    norm = torch.tensor([0x7FC0, 0x7FC1, 0x7F80], dtype=torch.uint16).view(torch.bfloat16)  # NaN, another, infinity
    tensors = {"a.up_proj.weight": random_weights((64, 64), torch.bfloat16, 0), "norm.weight": norm}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok
    _flip(tmp_path / "out", "norm.weight", 16)  # a NaN becomes another
    assert [result.name for result in octavo.verify(tmp_path / "out", source).different] == ["norm.weight"]
    _flip(tmp_path / "out", "norm.weight", 16)
    edit_tensors(tmp_path / "out", lambda t: t["a.up_proj.weight_scale"].fill_(float("nan")))
    (different,) = octavo.verify(tmp_path / "out", source).different
    assert different.error_db == -math.inf


def test_verify_does_not_compare_a_folder_with_itself(small: Path) -> None:
    fails(CheckpointError, "compared with itself", lambda: octavo.verify(small, small))


def test_verify_finds_weights_quantized_from_other_values(small: Path, tmp_path: Path) -> None:
    octavo.convert(small, tmp_path / "out")
    other = write_checkpoint(tmp_path / "other", {n: t * 1.5 for n, t in tensors_of_size(3, 96).items()}, 3, CONFIG)
    report = octavo.verify(tmp_path / "out", other)
    assert not report.ok
    assert len(report.different) == 9


def test_verify_command_exits_1_for_a_flipped_bit_and_2_for_a_missing_tensor(
    small: Path, tmp_path: Path, run: Run
) -> None:
    dst = tmp_path / "out"
    octavo.convert(small, dst)
    _flip(dst, _WEIGHT, 3)
    flipped = run("verify", dst, "--against", small)
    assert f"{_WEIGHT}  fp8_channel  1 bytes differ" in flipped.out
    assert "DIFFERENT: 1 tensors" in flipped.out
    assert (flipped.code, flipped.err) == (1, "")
    _flip(dst, _WEIGHT, 3)
    file = dst / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors.pop(_WEIGHT)
    save_file(tensors, file)
    (dst / "model.safetensors.index.json").unlink()
    refused(run("verify", dst, "--against", small), f"{_WEIGHT}: in {small}, but not here")
