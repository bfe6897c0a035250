"""What octavo makes of checkpoints that are quantized already, read by stock transformers.

It is to hold the bits of `schemes.dequantize` of every weight that was quantized anew, and of all others what decoding
the source gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_formats import CONFIGS

import octavo
from helpers import same_bytes, write_checkpoint
from helpers.coded_models import by_modelopt, in_blocks, in_int4
from helpers.folders import tensors_of
from helpers.models import random_model
from helpers.stock import different, from_stock, scales_of, unpacked, write_reference

CT = "compressed-tensors"

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]


@pytest.mark.parametrize(
    ("architecture", "source_of", "format", "scheme"),
    [
        ("deepseek_v3", in_int4, "fp8", "fp8_block"),
        ("deepseek_v3", in_int4, "compressed-tensors", "fp8_channel"),
        ("deepseek_v3", in_blocks, "fp8", "fp8_block"),
        ("llama", by_modelopt, "compressed-tensors", "fp8_channel"),
        ("llama", by_modelopt, "compressed-tensors", "int8_channel"),
    ],
)
def test_stock_transformers_reads_what_a_quantized_source_became(
    architecture: str, source_of: Callable[[Path, Path], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    random_model(*CONFIGS[architecture]).save_pretrained(tmp_path / "bf16")
    source = source_of(tmp_path / "bf16", tmp_path / "coded")
    octavo.convert(source, tmp_path / "decoded", None)
    octavo.convert(source, tmp_path / "made", scheme, format=format)
    assert any(".mlp." in name for name in scales_of(unpacked(tensors_of(tmp_path / "made")), format))
    write_reference(tmp_path / "decoded", tmp_path / "made", tmp_path / "wanted", format, scheme)
    assert octavo.verify(tmp_path / "made", source).ok
    made = from_stock(tmp_path / "made", dequantize=True)
    assert different(made, from_stock(tmp_path / "wanted")) == []


def test_stock_transformers_reads_packed_int8_with_scales_in_float32(tmp_path: Path) -> None:
    """It decodes weights as octavo does; only what it leaves packed has scales in the dtype of its model."""
    random_model(*CONFIGS["llama"]).save_pretrained(tmp_path / "bf16")
    octavo.convert(tmp_path / "bf16", tmp_path / "int8", "int8_channel", format="compressed-tensors-w8a8")
    stored = tensors_of(tmp_path / "int8")
    stored = {name: tensor * 1.001 if name.endswith("_scale") else tensor for name, tensor in stored.items()}
    config = json.loads((tmp_path / "int8/config.json").read_text())
    source = write_checkpoint(tmp_path / "source", stored, config=config)
    report = octavo.convert(source, tmp_path / "made")
    assert report.passed_through == report.quantized
    assert all(
        scale.dtype == torch.float32 for scale in scales_of(unpacked(tensors_of(tmp_path / "made")), CT).values()
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = from_stock(tmp_path / "made", dequantize=True, dtype=dtype)
        for name, scale in scales_of(stored, CT).items():
            assert same_bytes(model.get_parameter(name).data, (stored[name].float() * scale).to(dtype)), name
