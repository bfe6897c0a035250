"""`octavo convert` and `octavo verify`: what they write and tell, and what they refuse before they write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import octavo
from helpers import write_checkpoint
from helpers.command import Run, only_json, refused


def test_convert_writes_and_reports(llama: Path, tmp_path: Path, run: Run) -> None:
    ended = run("convert", llama, tmp_path / "out", "--scheme", "fp8_block", "--format", "fp8", "--threads", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith(f"written: {tmp_path / 'out'}\n")
    for part in ("unquantized", "kept: embedding", "readers of the fp8 format"):
        assert part in ended.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_convert_as_json_is_the_report(llama: Path, tmp_path: Path, run: Run) -> None:
    found = only_json(run("convert", llama, tmp_path / "out", "--json", "--staging", "4MiB"))
    assert found["quantized"]["fp8_channel"]["tensors"] == 14
    assert found["staging_bytes"] <= 4 << 20
    assert found["source_bytes"] == octavo.plan(llama, model=False).source_bytes
    assert octavo.verify(tmp_path / "out", llama).ok


def test_convert_without_a_scheme_copies(llama: Path, tmp_path: Path, run: Run) -> None:
    ran = run("convert", llama, tmp_path / "out", "-s", "none")
    assert ran.code == 0
    assert "nothing was quantized" in ran.out
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_convert_refuses_a_target_that_exists(llama: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", llama, tmp_path), str(tmp_path), "exists already")
    refused(run("convert", llama, tmp_path, "--json"), "exists already")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--format", "gguf"], ["unknown format 'gguf'", "compressed-tensors-w8a8, fp8"]),
        (["--format", "fp8"], ["has no fp8_channel, only fp8_block"]),
        (["--ignore", "nothing.like.it"], ["matches no tensor"]),
        (["--threads", "0"], ["at least 1"]),
    ],
)
def test_convert_refuses_what_it_can_t_honour(
    options: list[str], parts: list[str], llama: Path, tmp_path: Path, run: Run
) -> None:
    refused(run("convert", llama, tmp_path / "out", *options), *parts)
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_scheme_that_the_format_lacks_whatever_the_shapes(tmp_path: Path, run: Run) -> None:
    ragged = write_checkpoint(tmp_path / "ragged", {"a.up_proj.weight": torch.ones(200, 300).bfloat16()})
    refused(run("convert", ragged, tmp_path / "out", "--format", "fp8"), "has no fp8_channel, only fp8_block")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "banana"])
def test_convert_on_a_device_that_is_not_here_is_refused(device: str, llama: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", llama, tmp_path / "out", "--device", device), device)


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_says_equal_and_how_large_the_error_is(llama: Path, converted: Path, run: Run) -> None:
    ended = run("verify", converted, "--against", llama)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"model\.layers\.0\.mlp\.up_proj\.weight  fp8_channel  equal  3\d\.\d\d dB", ended.out)
    assert ended.out.endswith("all bytes equal\n")


def test_verify_as_json_lists_every_tensor(llama: Path, converted: Path, run: Run) -> None:
    found = only_json(run("verify", converted, "--against", llama, "--json"))
    assert found["ok"] is True
    assert {tensor["name"] for tensor in found["tensors"]} == set(load_file(llama / "model.safetensors"))


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_1_when_a_byte_differs(as_json: bool, llama: Path, tmp_path: Path, run: Run) -> None:
    octavo.convert(llama, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    ended = run("verify", tmp_path / "out", "--against", llama, *(["--json"] if as_json else []))
    if as_json:
        assert only_json(ended)["ok"] is False
    else:
        assert "DIFFERENT: 1 tensors" in ended.out
    assert ended.code == 1


def test_verify_against_another_model_exits_2(converted: Path, tmp_path: Path, run: Run) -> None:
    other = write_checkpoint(tmp_path / "other", {"alien.weight": torch.ones(2, 2)})
    refused(run("verify", converted, "--against", other), "alien.weight", "Was it made from")
