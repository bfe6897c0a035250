"""Checkpoints to read, a reference to compare with, and ways to run a plan; see also `helpers.reference`."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.checkpoint import dtypes
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.files import Identity
from octavo.checkpoint.header import Shard, TensorInfo
from octavo.elements.pieces import Piece
from octavo.planning.budget import Budget
from octavo.planning.plan import Plan
from octavo.streaming.sinks import ParameterSink, Storage
from octavo.streaming.stream import Stream, Tally

SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8", "int8_channel")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder as the hub lays it out: one file, or ``shards`` numbered files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(whole), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: whole[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def one_tensor(folder: Path, tensor: Tensor, name: str = "a.weight") -> Checkpoint:
    return Checkpoint.open(write_checkpoint(folder, {name: tensor}))


def headers(
    shapes: Mapping[str, Sequence[int]],
    dtype: str | Mapping[str, str] = "BF16",
    config: Mapping[str, Any] | None = None,
    shard_of: Mapping[str, int] | None = None,
) -> Checkpoint:
    """A checkpoint without files, for plans that nobody executes; tensors lie in the order given."""
    infos, ends = {}, {}
    for name, shape in shapes.items():
        shard = (shard_of or {}).get(name, 0)
        dtype_name = dtype if isinstance(dtype, str) else dtype.get(name, "BF16")
        nbytes = torch.Size(shape).numel() * dtypes.BITS[dtype_name] // 8
        offset = ends.get(shard, 100)
        infos[name] = TensorInfo(name, dtype_name, tuple(shape), shard, offset, nbytes)
        ends[shard] = offset + nbytes
    count = max(ends, default=0) + 1
    files = tuple(Shard(Path(f"/nowhere/{i}.safetensors"), Identity(0, i, ends.get(i, 0), 0, 0)) for i in range(count))
    return Checkpoint(Path("/nowhere"), files, infos, dict(config or {}))


def random_weights(shape: Sequence[int], dtype: torch.dtype, seed: int, kind: str = "normal") -> Tensor:
    """Finite weights. ``bits``: every bit pattern is as likely, so that all exponents occur, subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "bits":
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        limit = torch.iinfo(integers)
        bits = torch.randint(limit.min, limit.max + 1, tuple(shape), generator=generator)
        weights = bits.to(integers).view(dtype)
        return torch.where(torch.isfinite(weights), weights, torch.zeros((), dtype=dtype))
    weights = torch.randn(tuple(shape), generator=generator) * 0.05
    if kind == "sparse":  # rows and columns of zeros, and a few large values
        weights *= torch.rand(tuple(shape), generator=generator) < 0.2
        weights *= 1 + 1000.0 * (torch.rand(tuple(shape), generator=generator) < 0.01)
    return weights.to(dtype)


def realize(piece: Piece, sources: Mapping[str, Tensor]) -> Tensor:
    """The values that a piece stands for, by its definition."""
    flat = sources[piece.src_name].contiguous().reshape(-1)
    return flat.as_strided(piece.size, piece.src_strides, piece.src_off)


def assemble(shape: Sequence[int], pieces: Sequence[Piece], sources: Mapping[str, Tensor]) -> Tensor:
    """The parameter that pieces make, and a proof that they write each element once."""
    first = next(iter(sources.values()))
    result, writes = torch.zeros(tuple(shape), dtype=first.dtype), torch.zeros(tuple(shape), dtype=torch.int32)
    for piece in pieces:
        piece.region(result).copy_(realize(piece, sources))
        piece.region(writes).add_(1)
    assert bool((writes == 1).all())
    return result


def run_plan(checkpoint: Checkpoint, plan: Plan, **options: Any) -> tuple[dict[str, Storage], Tally]:
    """Stream a plan into fresh memory, filled with garbage first."""
    storages = {placement.name: Storage.allocate(placement) for placement in plan.placements}
    for storage in storages.values():
        for tensor in filter(lambda t: t is not None, (storage.weight, storage.scale)):
            if tensor.numel():
                tensor.reshape(-1).view(torch.uint8).fill_(0x5A)
    progress = options.pop("progress", None)
    tally = Stream(checkpoint, plan, ParameterSink(storages), **options).run(progress)
    return storages, tally


def in_blocks(plan: Plan, *, lanes: int = 2, block_bytes: int = 1 << 16) -> Budget:
    """Small blocks, as on an accelerator; without lanes, chunks as on a CPU."""
    return dataclasses.replace(
        Budget.fit(plan.placements, plan.staging_bytes, 3, 1 << 15), lanes=lanes, block_bytes=block_bytes
    )


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits: unlike `torch.equal`, it tells 0.0 from -0.0 and knows FP8."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel():
        return True
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def threads_of_octavo() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo")]


def open_shards() -> list[str]:
    """Paths of all .safetensors files that this process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the descriptor of this very listing
            continue
        if ".safetensors" in path:
            found.append(path)
    return sorted(found)
