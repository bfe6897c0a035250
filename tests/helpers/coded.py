"""Checkpoints whose weights are quantized already, described by hand: no config says how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from helpers import write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.codings import Coding, Decoding
from octavo.checkpoint.header import TensorInfo
from octavo.numerics import schemes
from octavo.numerics.decoding import decode

BLOCKS = Decoding("float8", 128, 128)


#: kind of numbers -> dtype of codes, dtypes of scales
KINDS: dict[str, tuple[torch.dtype, tuple[torch.dtype, ...]]] = {
    "float8": (torch.float8_e4m3fn, (torch.float32, torch.bfloat16, torch.uint8)),
    "int8": (torch.int8, (torch.float32, torch.float16)),
    "int4_in_int32": (torch.int32, (torch.bfloat16, torch.float32)),
    "int8_in_int32": (torch.int32, (torch.bfloat16,)),
    "e2m1": (torch.uint8, (torch.uint8, torch.float8_e4m3fn)),
}


def coding_of(name: str, shape: Sequence[int], decoding: Decoding, transposed: bool = False) -> Coding:
    """A coding that nothing is known of but its shapes: the tensors of it are empty."""
    nothing = TensorInfo("", "F32", (), 0, 0, 0)
    return Coding(name, tuple(shape), decoding, nothing, nothing, transposed=transposed)


def encoded(coding: Coding, seed: int) -> dict[str, Tensor]:
    """Codes and scales at random, and sometimes zero points and a global scale, by what they are."""
    generator = torch.Generator().manual_seed(seed)
    kind = coding.decoding.kind
    dtype, scale_dtypes = KINDS[kind]
    width = coding.codes_shape[-1] * dtype.itemsize
    codes = torch.randint(0, 256, (*coding.codes_shape[:-1], width), generator=generator, dtype=torch.uint8)
    if dtype.is_floating_point:
        codes = torch.where(torch.isfinite(codes.view(dtype).float()), codes, torch.zeros((), dtype=torch.uint8))
    scale_dtype = scale_dtypes[seed % len(scale_dtypes)]
    if scale_dtype == torch.uint8:
        scale = torch.randint(110, 135, coding.grid, generator=generator, dtype=torch.uint8)
    else:
        scale = (torch.exp(torch.randn(coding.grid, generator=generator)) / 100).to(scale_dtype)
    found = {"codes": codes.view(dtype), "scale": scale}
    if kind.startswith("int") and seed % 3:
        integers = torch.int8 if kind == "int8" else torch.int32
        low, high = torch.iinfo(integers).min, torch.iinfo(integers).max
        found["zero_point"] = torch.randint(low, high, coding.zero_grid, generator=generator, dtype=integers)
    if scale_dtype == torch.float8_e4m3fn:
        found["global_scale"] = torch.exp(torch.randn(coding.grid[:-2], generator=generator))
    return found


def whole(coding: Coding, parts: Mapping[str, Tensor]) -> Tensor:
    """The weight in float32, by the definition of whole tensors."""
    more = {name: tensor for name, tensor in parts.items() if name not in ("codes", "scale")}
    if "global_scale" in more:
        more["global_scale"] = more["global_scale"][..., None, None]
    weight = decode(coding.matrix, parts["codes"], parts["scale"], coding.decoding, **more)
    return weight.mT if coding.transposed else weight


def write_coded(
    folder: Path, sources: Mapping[str, tuple[Coding, Mapping[str, Tensor]]], shards: int = 1
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint of codes, and then of scales: the one that it stands for, and its weights in float32."""
    stored = {
        f"{name}_{part}": parts[part]
        for part in ("codes", "scale", "zero_point", "global_scale")
        for name, (_, parts) in sources.items()
        if part in parts
    }
    files = Checkpoint.open(write_checkpoint(folder, stored, shards=shards))
    infos = {}
    for name, (coding, parts) in sources.items():
        held = {part: files.tensors[f"{name}_{part}"] for part in parts}
        powers = parts["scale"].dtype == torch.uint8
        made = dataclasses.replace(coding, decoding=dataclasses.replace(coding.decoding, powers=powers), **held)
        infos[name] = dataclasses.replace(held["codes"], name=name, dtype_name="BF16", shape=coding.shape, coding=made)
    weights = {name: whole(coding, parts) for name, (coding, parts) in sources.items()}
    return dataclasses.replace(files, tensors=infos, source=files), weights


def fine_grained(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in FP8 as DeepSeek has them, in blocks of 128x128 with ``weight_scale_inv``; all else as it is."""
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or any(kept in name for kept in ("embed", "head", ".gate.")):
            stored[name] = weight
            continue
        groups = schemes.get("fp8_block")
        scale = schemes.group_amax(weight, groups) / 448
        stored[name] = torch.empty(weight.shape, dtype=schemes.FP8)
        schemes.quantize_into(stored[name], weight, scale, groups)
        stored[f"{name}_scale_inv"] = scale
    return stored


def decoded(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `fine_grained` tensors stand for; in float32 where they are FP8."""
    return {
        name: decode(tuple(t.shape), t, stored[f"{name}_scale_inv"], BLOCKS) if t.dtype == schemes.FP8 else t
        for name, t in stored.items()
        if not name.endswith("_scale_inv")
    }


FINE_GRAINED = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
