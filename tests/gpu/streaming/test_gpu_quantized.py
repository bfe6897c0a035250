"""Checkpoints that are quantized already, decoded on a GPU: the bytes are the CPU's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from helpers import decoding_by_kernel, same_bytes, write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from octavo.numerics import decoding

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from _models import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    plain = make_checkpoint(request.param, root / "bf16")
    config = json.loads((plain / "config.json").read_text())
    stored = fine_grained(tensors_of(plain))
    return write_checkpoint(root / "fp8", stored, config={**config, "quantization_config": FINE_GRAINED})


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "mxfp8", None])
def test_a_model_on_a_gpu_has_the_bytes_of_one_on_a_cpu(scheme: str | None, source: Path) -> None:
    mine, theirs = state(octavo.load(source, scheme, "cuda")), state(octavo.load(source, scheme))
    assert mine.keys() == theirs.keys()
    assert all(tensor.is_cuda and same_bytes(tensor.cpu(), theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
def test_tensors_that_are_handed_out_on_a_gpu_are_those_of_a_cpu(scheme: str | None, source: Path) -> None:
    mine, theirs = (dict(octavo.stream(source, scheme, device)) for device in ("cuda", "cpu"))
    assert mine.keys() == theirs.keys()
    assert all(tensor.is_cuda and same_bytes(tensor.cpu(), theirs[name]) for name, tensor in mine.items())


def test_a_conversion_on_a_gpu_writes_the_bytes_of_a_cpu(source: Path, tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        octavo.convert(source, tmp_path / device, "fp8_channel", device=device, prove=False)
    mine, theirs = tensors_of(tmp_path / "cuda"), tensors_of(tmp_path / "cpu")
    assert all(same_bytes(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("kind", decoding_by_kernel.KINDS)
def test_boxes_of_all_kinds_have_the_bytes_of_a_cpu(kind: str) -> None:
    assert decoding.kernel(torch.device("cuda", 0)) is not None
    for seed in range(12):
        found = decoding_by_kernel.case(kind, seed, "cuda:0")
        if found is not None:
            decoding_by_kernel.check(*found)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
def test_without_kernels_a_gpu_makes_the_same_bytes(
    scheme: str | None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernels = state(octavo.load(source, scheme, "cuda"))
    monkeypatch.setattr(decoding, "kernel", lambda device: None)
    without = state(octavo.load(source, scheme, "cuda"))
    assert all(same_bytes(tensor, without[name]) for name, tensor in by_kernels.items())
