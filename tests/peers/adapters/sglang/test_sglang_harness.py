"""The way in which other tests load models of SGLang, on what SGLang loads without octavo."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sglang_loading import Job, load
from helpers.vllm_checkpoints import convert, make

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("sglang_loads"),
]


def test_a_checkpoint_and_its_conversion_are_loaded_and_errors_are_told(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    wide, converted, wrong = load(
        Job(source), Job(convert(source, "fp8_channel")), Job(source, {"load_format": "nonsense"})
    )
    assert not wide.error + converted.error
    assert wide.loaded == wide.served
    name = "model.layers.0.mlp.down_proj.weight"
    assert wide.loaded[name].startswith("torch.bfloat16 [128, 256]")
    assert converted.loaded[name].startswith("torch.float8_e4m3fn [128, 256]")
    assert converted.served[name].startswith("torch.float8_e4m3fn [256, 128]")  # turned for the kernel
    assert converted.quantization == "compressed-tensors"
    assert "nonsense" in wrong.error
