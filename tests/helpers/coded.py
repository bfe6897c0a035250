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
from octavo.checkpoint.packing import count
from octavo.numerics import schemes
from octavo.numerics.decoding import decode

BLOCKS = Decoding("float8", 128, 128)


def encoded(
    shape: Sequence[int], decoding: Decoding, seed: int, dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, Tensor]:
    """Codes and scales at random, by what they are."""
    *lead, rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*lead, rows, count(cols, decoding.pack)), generator=generator, dtype=torch.uint8)
    codes = torch.where(torch.isfinite(codes.view(dtype).float()), codes, torch.zeros((), dtype=torch.uint8))
    grid = (*lead, count(rows, decoding.group_rows), count(cols, decoding.group_cols))
    scale = torch.exp(torch.randn(grid, generator=generator)) / 100
    return {"codes": codes.view(dtype), "scale": scale}


def write_coded(
    folder: Path, sources: Mapping[str, tuple[Sequence[int], Decoding, Mapping[str, Tensor]]], shards: int = 1
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint of codes, and then of scales: the one that it stands for, and its weights in float32."""
    stored = {f"{name}_{part}": parts[part] for part in ("codes", "scale") for name, (*_, parts) in sources.items()}
    files = Checkpoint.open(write_checkpoint(folder, stored, shards=shards))
    infos, weights = {}, {}
    for name, (shape, decoding, parts) in sources.items():
        held = {part: files.tensors[f"{name}_{part}"] for part in parts}
        coding = Coding(name, tuple(shape), decoding, held["codes"], held["scale"])
        infos[name] = dataclasses.replace(
            held["codes"], name=name, dtype_name="BF16", shape=tuple(shape), coding=coding
        )
        weights[name] = decode(tuple(shape), parts["codes"], parts["scale"], decoding)
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
