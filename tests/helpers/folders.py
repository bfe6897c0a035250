"""Checkpoints in folders: read without octavo, changed, cut into shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Let ``edit`` change the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    return folder


def split_shards(source: Path, target: Path, shard_of: Callable[[str], int], count: int) -> Path:
    """Copy a checkpoint into ``count`` shards and an index; ``shard_of`` says where each tensor goes.

    Where target and source are one folder, the shards take the place of its file.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(source)
    if target == source:
        (source / "model.safetensors").unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {name: names[shard_of(name)] for name in tensors}
    for shard in names:
        mine = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(mine, target / shard, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target
