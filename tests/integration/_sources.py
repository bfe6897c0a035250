"""Sources of conversions, what must become of them, and ways to read a result without octavo."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import octavo
from helpers import random_weights, same_bytes
from octavo.numerics import schemes
from octavo.numerics.nvfp4 import Packed
from octavo.streaming.report import Report

MIB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "torch_dtype": "bfloat16",
}
W8A8 = "compressed-tensors-w8a8"
CASES = [
    *(("compressed-tensors", scheme) for scheme in schemes.SCHEMES),
    ("fp8", "fp8_block"),
    (W8A8, "int8_channel"),
]
by_case = pytest.mark.parametrize(("format", "scheme"), CASES)
by_scheme = pytest.mark.parametrize("scheme", list(schemes.SCHEMES))


def convert(*args: Any, **options: Any) -> Report:
    """`octavo.convert` that asks no readers, which takes most of the time; what they say is asked elsewhere."""
    return octavo.convert(*args, prove=False, **options)


def source_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Linear weights of even and ragged sides, one of them larger than a MiB, and everything that stays."""
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (256, 384),
        "model.layers.0.self_attn.k_proj.weight": (200, 160),  # ragged for 128, even for 32
        "model.layers.0.mlp.gate_proj.weight": (130, 257),  # ragged for all
        "model.layers.0.mlp.down_proj.weight": (1, 96),
        "model.layers.0.mlp.up_proj.weight": (77, 1),
        "model.layers.1.self_attn.o_proj.weight": (64, 128),
        "model.layers.1.mlp.gate_proj.weight": (1024, 1024),
        "model.layers.1.mlp.experts.0.up_proj.weight": (128, 256),
        "model.layers.1.mlp.experts.1.up_proj.weight": (128, 256),
    }
    tensors = {name: random_weights(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0  # a group of zeros has the scale 1
    kept = {
        "model.embed_tokens.weight": (96, 256),
        "model.layers.0.input_layernorm.weight": (256,),
        "model.layers.0.self_attn.q_proj.bias": (256,),
        "model.layers.1.mlp.gate.weight": (2, 256),
        "lm_head.weight": (96, 256),
    }
    tensors |= {name: random_weights(shape, dtype, 100 + seed) for seed, (name, shape) in enumerate(kept.items())}
    return tensors


def is_quantized(name: str, tensor: Tensor, format: str, scheme: str) -> bool:
    """What octavo's documentation says of these names, in a few lines of its own."""
    if not name.endswith("_proj.weight") or tensor.ndim != 2 or not tensor.dtype.is_floating_point:
        return False
    if tensor.shape[1] % {"mxfp8": 32, "nvfp4": 16}.get(scheme, 1):
        return False
    if (format, scheme) == ("compressed-tensors", "int8_channel") and tensor.shape[1] % 4:
        return False
    return format != "fp8" or all(side <= 128 or side % 128 == 0 for side in tensor.shape)


def expected(tensors: dict[str, Tensor], format: str, scheme: str) -> dict[str, Tensor]:
    """What a conversion holds, by the whole-tensor definition."""
    result = {}
    for name, tensor in tensors.items():
        if not is_quantized(name, tensor, format, scheme):
            result[name] = tensor
            continue
        q, scale = schemes.quantize(tensor, scheme)
        if scheme == "nvfp4":
            codes, groups = Packed.of(q)
            result |= {f"{name}_packed": codes.contiguous(), f"{name}_scale": groups.contiguous()}
            result[f"{name}_global_scale"] = (1 / scale).reshape(1)
            continue
        stored = scale.view(torch.uint8) if scheme == "mxfp8" else scale
        result[name + ("_scale_inv" if format == "fp8" else "_scale")] = stored.reshape(
            (1,) if stored.ndim == 0 else stored.shape
        )
        if (format, scheme) == ("compressed-tensors", "int8_channel"):
            result[name + "_scale"] = scale.bfloat16()
            result[name + "_packed"] = (q.int() + 128).to(torch.uint8).view(torch.int32)
            result[name + "_shape"] = torch.tensor(q.shape)
        else:
            result[name] = q
    return result


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder or file, read by safetensors itself."""
    tensors = {}
    for file in [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not same_bytes(found[name], wanted[name])] == []


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where data begin."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def write_by_hand(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], pad: int = 0) -> Path:
    """A safetensors file of any dtypes; ``pad`` more spaces in the header put the data on an odd address."""
    header, at = {}, 0
    for name, (dtype_name, shape, data) in tensors.items():
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return file


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_tensor(file: Path, name: str) -> tuple[str, list[int], bytes]:
    header, base = header_of(file)
    begin, end = header[name]["data_offsets"]
    return header[name]["dtype"], header[name]["shape"], file.read_bytes()[base + begin : base + end]
