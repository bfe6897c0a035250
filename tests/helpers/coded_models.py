"""Whole models as they are published quantized already, made of ones in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import write_checkpoint
from .coded import FINE_GRAINED, fine_grained
from .folders import tensors_of


def in_blocks(plain: Path, folder: Path) -> Path:
    """FP8 in blocks of 128 x 128, as DeepSeek-V3 has them."""
    config = json.loads((plain / "config.json").read_text())
    stored = fine_grained(tensors_of(plain))
    return write_checkpoint(folder, stored, config={**config, "quantization_config": FINE_GRAINED})


def in_int4(plain: Path, folder: Path) -> Path:
    """Experts as Kimi-K2 has them: random integers of four bits, in groups of 32 columns."""
    generator, stored = torch.Generator().manual_seed(0), {}
    for tensor_name, tensor in tensors_of(plain).items():
        if ".experts." not in tensor_name:
            stored[tensor_name] = tensor
            continue
        rows, cols = tensor.shape
        words = torch.randint(-(1 << 31), 1 << 31, (rows, cols // 8), generator=generator)
        scale = torch.rand(rows, cols // 32, generator=generator) * 0.01 + 0.001
        stored[f"{tensor_name}_packed"], stored[f"{tensor_name}_scale"] = words.int(), scale.bfloat16()
        stored[f"{tensor_name}_shape"] = torch.tensor([rows, cols])
    weights = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*layers\.0\.mlp.*", "re:.*gate$"]
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ignore}
    declared["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = json.loads((plain / "config.json").read_text())
    return write_checkpoint(folder, stored, config={**config, "quantization_config": declared})


def by_modelopt(plain: Path, folder: Path) -> Path:
    """A scale for each matrix, and one for its activations; `test_modelopt` has what ModelOpt itself wrote."""
    stored = {}
    for tensor_name, tensor in tensors_of(plain).items():
        if tensor.ndim != 2 or "embed" in tensor_name or "head" in tensor_name:
            stored[tensor_name] = tensor
            continue
        scale = tensor.abs().amax().float() / 448
        stored[tensor_name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{tensor_name}_scale"] = scale
        stored[f"{tensor_name.removesuffix('weight')}input_scale"] = torch.tensor(0.05)
    source = write_checkpoint(folder, stored, config=json.loads((plain / "config.json").read_text()))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    told = {"producer": {"name": "modelopt", "version": "0.44.0"}, "quantization": quantization}
    (source / "hf_quant_config.json").write_text(json.dumps(told))
    return source
