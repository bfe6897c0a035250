"""Checkpoints that are spoiled: each of these changes one in its folder, or makes what does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .folders import edit_tensors, split_shards

Tensors = dict[str, Tensor]
MLP = "model.layers.1.mlp."


def edit(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    """A spoiler that changes the tensors of the one file."""
    return lambda folder: edit_tensors(folder, change)


def drop(*names: str) -> Callable[[Path], object]:
    return edit(lambda tensors: [tensors.pop(name) for name in names])


def rename(old: str, new: str) -> Callable[[Path], object]:
    return edit(lambda tensors: tensors.update({new: tensors.pop(old)}))


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], object]:
    return edit(lambda tensors: tensors.update({name: change(tensors[name])}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def half_twice(folder: Path) -> None:
    """gate_proj in two shards, up_proj in none: as many elements as a whole layer has."""
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"{MLP}up_proj.weight")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    again = {f"{MLP}gate_proj.weight": tensors[f"{MLP}gate_proj.weight"].clone()}
    save_file(again, folder / "model-00002-of-00002.safetensors", {"format": "pt"})


def lose_shard(folder: Path) -> None:
    split_shards(folder, folder, lambda name: MLP in name, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()


def poison(tensor: Tensor) -> Tensor:
    tensor[3, 5] = torch.nan
    return tensor
