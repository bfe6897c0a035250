"""Checkpoints that other libraries wrote, decoded bit by bit as those libraries do it themselves.

Each library gives a weight in a dtype of its own choice, which is that of its scales or bf16. Octavo's is float32, and
is rounded to that dtype once. Where the library multiplies in bf16, that is the same: numbers and scales have eight
bits of mantissa at most, and their product is exact in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.quantized import decoded

pytestmark = pytest.mark.peers


def write(folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any] | None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if quantization is not None:
        (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def weights(rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randn(rows, 1, generator=generator) * 2 - 5)
    return (torch.randn(rows, cols, generator=generator) * sizes).to(dtype)


# -- compressed-tensors -----------------------------------------------------------------------------------------------

INT = {"type": "int", "dynamic": False}
FLOAT = {"type": "float", "dynamic": False}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "fp8, tensor": ({**FLOAT, "num_bits": 8, "strategy": "tensor"}, "float-quantized"),
    "fp8, channel": ({**FLOAT, "num_bits": 8, "strategy": "channel"}, "float-quantized"),
    "fp8, block": ({**FLOAT, "num_bits": 8, "strategy": "block", "block_structure": [128, 128]}, "float-quantized"),
    "int8, channel": ({**INT, "num_bits": 8, "strategy": "channel"}, "int-quantized"),
    "int8, zero points": ({**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}, "int-quantized"),
    "int8, tensor": ({**INT, "num_bits": 8, "strategy": "tensor"}, "int-quantized"),
    "int8, groups with zero points": (
        {**INT, "num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
        "int-quantized",
    ),
    "int8, naive": ({**INT, "num_bits": 8, "strategy": "channel"}, "naive-quantized"),
    "int4, a byte each": ({**INT, "num_bits": 4, "strategy": "channel"}, "int-quantized"),
    "int4, a byte each, zero points": (
        {**INT, "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "int-quantized",
    ),
    "fp8, group": ({**FLOAT, "num_bits": 8, "strategy": "group", "group_size": 64}, "float-quantized"),
    "packed int8, channel": ({**INT, "num_bits": 8, "strategy": "channel"}, "pack-quantized"),
    "packed int8, group": ({**INT, "num_bits": 8, "strategy": "group", "group_size": 64}, "pack-quantized"),
    "packed int8, zero points": (
        {**INT, "num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False},
        "pack-quantized",
    ),
    "int4, channel": ({**INT, "num_bits": 4, "strategy": "channel"}, "pack-quantized"),
    "int4, group": ({**INT, "num_bits": 4, "strategy": "group", "group_size": 32}, "pack-quantized"),
    "int4, zero points": (
        {**INT, "num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
        "pack-quantized",
    ),
    "int4, zero points of rows": ({**INT, "num_bits": 4, "strategy": "channel", "symmetric": False}, "pack-quantized"),
    "nvfp4": (
        {
            **FLOAT,
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
            "zp_dtype": "torch.float8_e4m3fn",
        },
        "nvfp4-pack-quantized",
    ),
    "mxfp4": (
        {
            **FLOAT,
            "num_bits": 4,
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        },
        "mxfp4-pack-quantized",
    ),
    "mxfp8": (
        {
            **FLOAT,
            "num_bits": 8,
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        },
        "mxfp8-quantized",
    ),
}


def compressed(
    arguments: Mapping[str, Any], layout: str, dtype: torch.dtype, rows: int, cols: int = 256
) -> tuple[Any, nn.Module]:
    """A compressor, and a model with one layer of linear weights in its format and one that is excluded."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = nn.Module()
    for number, name in enumerate(("up", "down", "lm_head")):
        layer = nn.Linear(cols, rows + 4 * number, bias=False, dtype=dtype)
        layer.weight.data = weights(rows + 4 * number, cols, dtype, number)
        model.add_module(name, layer)
    group = {"targets": ["Linear"], "weights": dict(arguments), "format": layout}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=layout)
    apply_quantization_config(model, config)
    for layer in (model.up, model.down):
        args = layer.quantization_scheme.weights
        least, most = extremes(layer.weight.data, arguments)
        by = None
        if arguments["strategy"] == "tensor_group":
            by = generate_gparam(layer.weight.data.min().reshape(1), layer.weight.data.max().reshape(1))
            layer.weight_global_scale.data = by
        scale, zero = calculate_qparams(least, most, args, global_scale=by)
        layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data = zero.to(layer.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model, layout)
    compressor.compress_model(model)
    return compressor, model


def extremes(weight: Tensor, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group, in the shape that its scales have."""
    rows, cols = weight.shape
    strategy = arguments["strategy"]
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "block":
        padded = nn.functional.pad(weight, (0, -cols % 128, 0, -rows % 128))
        blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.view(rows, -1, arguments.get("group_size", cols))
    return groups.amin(-1), groups.amax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [128, 100])
@pytest.mark.parametrize("case", CASES)
def test_compressed_tensors_decompresses_to_the_same(case: str, rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compressor, model = compressed(*CASES[case], dtype, rows)
    write(tmp_path, model.state_dict(), None)
    compressor.update_config(str(tmp_path))
    found = decoded(tmp_path)
    compressor.decompress_model(model)
    assert found.keys() == {"up.weight", "down.weight"}
    for name, weight in found.items():
        theirs = model.get_parameter(name).data
        assert same_bytes(weight.to(theirs.dtype), theirs), name


RAGGED = ("int4, channel", "int4, zero points of rows", "packed int8, channel")


@pytest.mark.parametrize(("case", "cols"), [*((case, 256) for case in CASES), *((case, 101) for case in RAGGED)])
def test_a_conversion_to_bf16_is_what_compressed_tensors_decompresses(case: str, cols: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compressor, model = compressed(*CASES[case], torch.bfloat16, 100, cols)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source, model.state_dict(), None)
    compressor.update_config(str(source))
    octavo.convert(source, target, scheme=None)
    compressor.decompress_model(model)
    found = tensors_of(target)
    assert found.keys() == {"up.weight", "down.weight", "lm_head.weight"}
    assert all(same_bytes(weight, model.get_parameter(name).data) for name, weight in found.items())
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), None])
def test_transformers_dequantizes_fine_grained_fp8_to_the_same(
    block: tuple[int, int] | None, layout: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=layout)
    quantizer = FineGrainedFP8HfQuantizer(config, pre_quantized=False)
    stack = torch.stack([weights(128, 256, torch.bfloat16, seed) for seed in range(3)])
    sources = {"m.q_proj.weight": weights(256, 384, torch.bfloat16), "m.experts.down_proj": stack}
    stored = Fp8Quantize(quantizer).convert(sources)
    write(tmp_path, stored, config.to_dict())
    found = decoded(tmp_path)
    assert found.keys() == sources.keys()
    for name, weight in found.items():
        scale = stored[f"{name}_scale_inv"]
        for dtype in (torch.float32, torch.bfloat16):
            theirs = Fp8Dequantize(quantizer)._dequantize_one(stored[name], scale, dtype)
            assert same_bytes(weight.to(dtype), theirs), name


def test_transformers_takes_blocks_to_be_of_equal_height_where_the_last_is_shorter(tmp_path: Path) -> None:
    """DeepSeek's blocks have 128 rows: of 160 rows, the second has 32. transformers takes two of 80.

    It refuses sides that its blocks don't divide, such as the 576 rows of kv_a_proj_with_mqa, whose grid has five.
    """
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = weights(160, 128, torch.float32).clamp(-400, 400).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [2.0]])
    stored = {"kv.weight": codes, "kv.weight_scale_inv": scale}
    write(tmp_path, stored, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    found, theirs = decoded(tmp_path)["kv.weight"], Fp8Dequantize(None)._dequantize_one(codes, scale)
    assert same_bytes(found[:128], codes[:128].float())
    assert same_bytes(found[128:], codes[128:].float() * 2)
    assert same_bytes(found[:80], theirs[:80])
    assert same_bytes(found[128:], theirs[128:])
    assert not torch.equal(found[80:128], theirs[80:128])
    with pytest.raises(ValueError, match="not divisible"):
        Fp8Dequantize(None)._dequantize_one(codes[:159], scale)


def test_transformers_dequantizes_experts_of_four_bits_to_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.randint(-128, 128, (64, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.arange(256, dtype=torch.uint8).reshape(64, 4).clamp(max=250).view(torch.float8_e8m0fnu)
    write(
        tmp_path, {"e.w1.weight": codes, "e.w1.scale": scale}, {"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)
    assert same_bytes(decoded(tmp_path)["e.w1.weight"], theirs)


def test_transformers_dequantizes_stacks_of_gpt_oss_to_the_same(tmp_path: Path) -> None:
    """All bytes, with all exponents but that which is no number, and those of which six times is infinite."""
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 63, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.arange(2 * 63 * 4).reshape(2, 63, 4).remainder(252).to(torch.uint8)
    usual = scales.clamp(max=226)  # a conversion refuses larger ones
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    weight = decoded(tmp_path)[name]
    assert weight.shape == (2, 128, 63)
    for dtype in (torch.bfloat16, torch.float32):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert same_bytes(weight.to(dtype), theirs)
    write(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": usual}, {"quant_method": "mxfp4"})
    octavo.convert(tmp_path, tmp_path / "target", scheme=None)
    theirs = convert_moe_packed_tensors(blocks, usual, dtype=torch.bfloat16)
    assert same_bytes(tensors_of(tmp_path / "target")[name], theirs)
