"""Checkpoints that ModelOpt quantized and exported, decoded as its own tensors do it.

In float32, all are the same bit by bit. In bf16, ModelOpt's FP8 rounds each scale to bf16 before it multiplies, and the
product again: there octavo is the more exact one, as it rounds the product alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import octavo
from helpers import same_bytes
from helpers.quantized import decoded
from octavo.numerics.schemes import error_db

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import qtensor

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

FP8, NVFP4, MXFP4, MXFP8 = "FP8QTensor", "NVFP4QTensor", "MXFP4QTensor", "MXFP8QTensor"
INT8 = "INT8QTensor"
#: ModelOpt's config -> the class of its tensors, and sides of the blocks that it is asked with
CONFIGS: dict[str, tuple[str, dict[int, int] | None]] = {
    "FP8_DEFAULT_CFG": (FP8, None),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": (FP8, None),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": (FP8, {-1: 128, -2: 128}),
    "INT8_DEFAULT_CFG": (INT8, None),
    "INT8_WEIGHT_ONLY_CFG": (INT8, None),
    "MXFP8_DEFAULT_CFG": (MXFP8, {-1: 32}),
    "NVFP4_DEFAULT_CFG": (NVFP4, {-1: 16}),
    "W4A16_NVFP4_CFG": (NVFP4, {-1: 16}),
    "W4A8_NVFP4_FP8_CFG": (NVFP4, {-1: 32}),
    "MXFP4_DEFAULT_CFG": (MXFP4, {-1: 32}),
    "W4A8_MXFP4_FP8_CFG": (MXFP4, {-1: 32}),
}


def export(config: str | dict[str, Any], folder: Path) -> Mapping[str, Tensor]:
    """A tiny Llama, quantized by ModelOpt; returns its weights as they were."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(made).to(torch.bfloat16).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    chosen = getattr(mtq, config) if isinstance(config, str) else config
    model = mtq.quantize(model, chosen, lambda model: model(torch.arange(32).view(1, -1)))
    with torch.inference_mode():
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
    return before


def theirs(config: str, stored: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    kind, sides = CONFIGS[config]
    scale = stored[f"{name}_scale"]
    options = {} if sides is None else {"block_sizes": sides}
    if kind == NVFP4:
        options["double_scale"] = stored[f"{name}_scale_2"]
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.ndim == 4:
        scale = scale[:, 0, :, 0]
    weight: Tensor = getattr(qtensor, kind)(shape, dtype, stored[name]).dequantize(dtype, scale=scale, **options)
    return weight


@pytest.mark.parametrize("config", CONFIGS)
def test_modelopt_dequantizes_to_the_same(config: str, tmp_path: Path) -> None:
    export(config, tmp_path)
    found, stored = decoded(tmp_path), load_file(tmp_path / "model.safetensors")
    assert len(found) == 7
    for name, weight in found.items():
        dtypes = [torch.float32] if CONFIGS[config][0] in (FP8, INT8) else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            other = theirs(config, stored, name, weight.shape, dtype)
            assert torch.equal(weight.to(dtype), other)  # of zeros, ModelOpt does not keep the sign
            assert same_bytes(weight.to(dtype) + 0, other + 0)


def test_modelopt_rounds_scales_of_fp8_to_bf16_first(tmp_path: Path) -> None:
    export("FP8_PER_CHANNEL_PER_TOKEN_CFG", tmp_path)
    found, stored = decoded(tmp_path), load_file(tmp_path / "model.safetensors")
    for name, weight in found.items():
        other = theirs("FP8_PER_CHANNEL_PER_TOKEN_CFG", stored, name, weight.shape, torch.bfloat16)
        scale = stored[f"{name}_scale"].bfloat16()[:, None]
        assert same_bytes((stored[name].float() * scale.float()).bfloat16(), other)
        assert not torch.equal(weight.bfloat16(), other)


#: what a layer may have in a mixture
_QUANTIZERS = {
    "FP8": {"num_bits": (4, 3), "axis": None},
    "FP8 a row": {"num_bits": (4, 3), "axis": 0},
    "int8": {"num_bits": 8, "axis": 0},
    "NVFP4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
}


@pytest.mark.parametrize("mlp", ["FP8", "NVFP4"])
@pytest.mark.parametrize("attention", ["FP8", "FP8 a row", "int8"])
def test_mixtures_are_decoded_whatever_declares_them(attention: str, mlp: str, tmp_path: Path) -> None:
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*self_attn*weight_quantizer", "cfg": _QUANTIZERS[attention]},
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": _QUANTIZERS[mlp]},
    ]
    before = export({"quant_cfg": rules, "algorithm": "max"}, tmp_path)
    found = []
    for declaring in ("hf_quant_config.json", "config.json", None):  # and then less of it
        found.append(dict(octavo.stream(tmp_path, None)))
        if declaring is not None:
            (tmp_path / declaring).unlink()
    assert all(same_bytes(found[0][name], weight) for more in found[1:] for name, weight in more.items())
    for part, kind in (("self_attn.o_proj", attention), ("mlp.down_proj", mlp)):
        name = f"model.layers.0.{part}.weight"
        least = {"NVFP4": 19, "int8": 40}.get(kind, 30)
        assert error_db(before[name], found[0][name]) > least
