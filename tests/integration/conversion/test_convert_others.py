"""Converting what is no matrix of bf16: other dtypes, stacks, ragged sides, nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _sources import CONFIG, assert_same, raw_bytes, raw_tensor, read_all, write_by_hand

import octavo
from helpers import random_weights, write_checkpoint
from octavo.checkpoint import dtypes
from octavo.errors import OctavoError
from octavo.numerics import schemes

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")

_TORCH_NAMED = [name for name, dtype in dtypes.TORCH.items() if dtype is not None]
_TORCHLESS = [name for name, dtype in dtypes.TORCH.items() if dtype is None]


def _of_every_dtype(dtype_names: list[str]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """``odd.F4``: 6 x 8 elements of every bit pattern that comes, beside one weight that is quantized."""
    weight = random_weights((64, 64), torch.bfloat16, 1)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {"a.up_proj.weight": ("BF16", (64, 64), raw_bytes(weight))}
    for number, dtype_name in enumerate(dtype_names):
        data = bytes(
            (7 * i + number) % (2 if dtype_name == "BOOL" else 256) for i in range(48 * dtypes.BITS[dtype_name] // 8)
        )
        tensors[f"odd.{dtype_name}"] = (dtype_name, (6, 8), data)
        # named and shaped like a linear layer's weight; floats among them are of course quantized
        if dtypes.TORCH[dtype_name] not in dtypes.QUANTIZABLE:
            tensors[f"b.{dtype_name}.up_proj.weight"] = (dtype_name, (6, 8), data)
    return tensors


@pytest.mark.parametrize("kind", ["torch has them", "torch lacks them"])
def test_other_dtypes_pass_through_byte_for_byte(kind: str, tmp_path: Path) -> None:
    entries = _of_every_dtype(_TORCH_NAMED if kind == "torch has them" else _TORCHLESS)
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    report = octavo.convert(source, tmp_path / "out")
    for name, (dtype_name, shape, data) in entries.items():
        if name != "a.up_proj.weight":
            assert raw_tensor(tmp_path / "out" / "model.safetensors", name) == (dtype_name, list(shape), data)
    assert report.quantized["fp8_channel"][0] == 1
    if kind == "torch lacks them":
        assert {reason.split(",")[0] for reason in report.kept} == set(_TORCHLESS)


def test_dtypes_that_torch_has_can_be_verified_and_streamed(tmp_path: Path) -> None:
    entries = _of_every_dtype(_TORCH_NAMED)
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok
    for name, tensor in octavo.stream(source):
        if name in entries and name != "a.up_proj.weight":
            assert (dtypes.NAMES[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor)) == entries[name]


@pytest.mark.parametrize("dtype_name", _TORCHLESS)
def test_dtypes_that_torch_lacks_can_be_verified(dtype_name: str, tmp_path: Path) -> None:
    source = write_by_hand(tmp_path / "source" / "model.safetensors", _of_every_dtype([dtype_name]))
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("dtype_name", _TORCHLESS)
def test_dtypes_that_torch_lacks_are_streamed_as_bytes_or_refused(dtype_name: str, tmp_path: Path) -> None:
    entries = _of_every_dtype([dtype_name])
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    try:
        streamed = dict(octavo.stream(source))
    except OctavoError as error:
        assert dtype_name in str(error)  # noqa: PT017
    else:
        assert raw_bytes(streamed[f"odd.{dtype_name}"]) == entries[f"odd.{dtype_name}"][2]


def test_expert_stacks_stay_and_the_report_says_why(tmp_path: Path) -> None:
    stacks = {
        "model.layers.0.mlp.experts.gate_up_proj": random_weights((4, 64, 96), torch.bfloat16, 1),
        "model.layers.0.mlp.experts.down_proj": random_weights((4, 96, 32), torch.bfloat16, 2),
        "model.layers.0.self_attn.q_proj.weight": random_weights((64, 64), torch.bfloat16, 3),
    }
    source = write_checkpoint(tmp_path / "source", stacks, 1, CONFIG)
    report = octavo.convert(source, tmp_path / "out")
    assert_same(
        {name: tensor for name, tensor in read_all(tmp_path / "out").items() if "experts" in name},
        {name: tensor for name, tensor in stacks.items() if "experts" in name},
    )
    ((reason, (count, _)),) = report.kept.items()
    assert "expert stack" in reason
    assert "3-D" in reason
    assert count == 2
    assert "expert stack" in report.table()
    assert octavo.verify(tmp_path / "out", source).ok


def test_transposed_expert_stacks_stay_too(tmp_path: Path) -> None:
    stacks = {"model.layers.0.mlp.experts.gate_up_proj": random_weights((4, 64, 96), torch.bfloat16, 1)}
    source = write_checkpoint(tmp_path / "source", stacks, 1, {"model_type": "gpt_oss"})
    report = octavo.convert(source, tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), stacks)
    assert [reason for reason in report.kept if "expert stack" in reason]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ragged_sides_stay_in_the_fp8_format_and_the_report_says_why(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    report = octavo.convert(sources("single"), tmp_path / "out", "fp8_block", format="fp8")
    reasons = " | ".join(report.kept)
    for sides in ("200x160", "130x257"):
        assert f"{sides}: readers of the fp8 format" in reasons
    found = read_all(tmp_path / "out")
    assert found["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.k_proj.weight_scale_inv" not in found


def test_empty_and_scalar_tensors_pass_through(tmp_path: Path) -> None:
    tensors = {
        "a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1),
        "empty.up_proj.weight": torch.zeros(0, 32, dtype=torch.bfloat16),
        "wide.up_proj.weight": torch.zeros(32, 0, dtype=torch.bfloat16),
        "none": torch.zeros(0),
        "empty.experts.gate_up_proj": torch.zeros(3, 0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(7, dtype=torch.int64),
        "z.last": torch.zeros(5, 0, 2, dtype=torch.uint8),
    }
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    q, scale = schemes.quantize(tensors["a.up_proj.weight"], "fp8_channel")
    wanted = {**tensors, "a.up_proj.weight": q, "a.up_proj.weight_scale": scale}
    assert_same(read_all(tmp_path / "out"), wanted)
    assert octavo.verify(tmp_path / "out", source).ok
    assert_same(dict(octavo.stream(source)), wanted)


def test_shard_without_tensors_passes_through(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, {"a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1)}, 1, CONFIG)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    write_by_hand(source / "model-00002-of-00002.safetensors", {})
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


def test_scale_name_that_the_source_already_uses_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1),
        "a.up_proj.weight_scale": torch.ones(1),
    }
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    with pytest.raises(OctavoError, match="weight_scale"):
        octavo.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_would_be_joined_under_other_global_scales_are_named(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.self_attn.{name}_proj.weight" for number in range(3) for name in "qk"]
    tensors = {name: random_weights((32, 64), torch.bfloat16, seed).clamp_(-3, 3) for seed, name in enumerate(names)}
    tensors[names[2]][3, 3] = 7.0  # above 6.75
    for name in names[4:]:
        tensors[name][3, 3] = 7.0
    source = write_checkpoint(tmp_path / "source", tensors, 3)
    report = octavo.convert(source, tmp_path / "out", "nvfp4", prove=False)
    (note,) = (note for note in report.notes if "global scales differ" in note)
    assert note.startswith("1 modules have layers")
    assert "model.layers.1.self_attn has (k_proj 2^-8, q_proj 2^-4)" in note
    assert "ignore=['model.layers.1.self_attn']" in note
