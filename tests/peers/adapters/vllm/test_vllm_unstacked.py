"""Stacks of experts that were cut for vLLM: its own loading makes of the matrices what it makes of the stacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import make
from helpers.vllm_models import build, one_rank
from helpers.vllm_reading import convert_for
from octavo.adapters.vllm import cpu_kernels
from octavo.adapters.vllm.reader import VllmReader
from octavo.numerics.schemes import FP8

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_loads")]

STACKED = ["granitemoe", "granitemoehybrid", "gemma4", "llama4"]
#: of what a quantized matrix is in bf16, root of mean squares
TOLERANCE = 0.05


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> Iterator[None]:
    cpu_kernels.register()
    with one_rank():
        yield


@pytest.fixture(scope="module")
def reader() -> VllmReader:
    return VllmReader()


def loaded(folder: Path) -> dict[str, Tensor]:
    """Parameters of experts as vLLM loads them, with NaN where it loads nothing."""
    model: nn.Module = build(folder)
    parameters = {name: p for name, p in model.named_parameters() if ".w13_" in name or ".w2_" in name}
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.dtype == FP8:
                parameter.view(torch.uint8).fill_(0x7F)
            else:
                parameter.fill_(torch.nan)
    model.load_weights(iter(tensors_of(folder).items()))  # type: ignore[operator]
    return {name: parameter.detach() for name, parameter in parameters.items()}


def dequantized(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of experts, in float32."""
    found = {}
    for name, weight in parameters.items():
        if name.endswith("_weight"):
            scale = parameters.get(f"{name}_scale", parameters.get(f"{name}_scale_inv"))
            assert weight.dtype == FP8
            assert scale is not None
            if scale.shape[-2] != weight.shape[-2]:
                scale = scale.repeat_interleave(128, -2)[..., : weight.shape[-2], :]
            if scale.shape[-1] != 1:
                scale = scale.repeat_interleave(128, -1)[..., : weight.shape[-1]]
            found[name] = weight.float() * scale
    return found


@pytest.mark.parametrize(
    ("format", "scheme"),
    [("compressed-tensors", "fp8_channel"), ("compressed-tensors", "fp8_block"), ("fp8", "fp8_block")],
    ids=["channel", "block", "fp8 format"],
)
@pytest.mark.parametrize("name", STACKED)
def test_matrices_are_read_as_the_stacks_are(
    name: str, format: str, scheme: str, reader: VllmReader, tmp_path: Path
) -> None:
    source = make(name, tmp_path / "bf16")
    assert any(tensor.ndim == 3 and tensor.shape[1] > 1 for tensor in tensors_of(source).values())
    out, report = convert_for(reader, source, scheme, format)
    assert not any("expert" in reason for reason in report.kept)
    assert octavo.verify(out, source).ok
    stacks, mine = loaded(source), dequantized(loaded(out))
    assert mine.keys() == stacks.keys()
    for parameter, wanted in stacks.items():
        error = (mine[parameter] - wanted.float()).norm() / wanted.float().norm()
        assert error < TOLERANCE, (parameter, float(error))


def test_names_that_are_known_are_those_that_vllm_takes(tmp_path: Path) -> None:
    """Where vLLM is not installed, what was found out here decides. Older versions have other names for some."""
    pytest.importorskip("vllm", "0.32")
    for name in STACKED:
        source = make(name, tmp_path / name)
        octavo.convert(source, tmp_path / f"{name}-fp8", prove=False)
        stacks: Any = loaded(source)
        assert dequantized(loaded(tmp_path / f"{name}-fp8")).keys() == stacks.keys()
