"""Checkpoints that are spoiled: each of these changes one in its folder, or makes what does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
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


#: what is wrong -> (architecture, spoiler, what octavo names), whatever engine loads it
SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a layer with no weights": (
        "llama",
        drop(*(f"{MLP}{part}_proj.weight" for part in ("gate", "up", "down"))),
        "model.layers.1.mlp.down_proj.weight [128, 256]: comes from no tensor of the checkpoint",
    ),
    "half a layer": ("llama", drop(f"{MLP}up_proj.weight"), f"only {MLP}gate_proj.weight goes there; "),
    "one half twice": ("llama", half_twice, f"tensor '{MLP}gate_proj.weight' is also in model-00001-of"),
    "no norm": (
        "llama",
        drop("model.layers.0.input_layernorm.weight"),
        "model.layers.0.input_layernorm.weight [128]: comes from no tensor",
    ),
    "not a number": ("llama", replace(f"{MLP}down_proj.weight", poison), f"tensor '{MLP}down_proj.weight' holds nan"),
    "half a download": ("llama", truncate, "model.safetensors: header declares"),
    "a shard that is missing": ("llama", lose_shard, "model-00002-of-00002.safetensors"),
    "integers": (
        "llama",
        replace(f"{MLP}down_proj.weight", lambda t: t.to(torch.int8)),
        f"{MLP}down_proj.weight goes there, which is I8",
    ),
}
#: an expert without one matrix; what octavo names differs
EXPERT = drop("model.layers.0.mlp.experts.2.down_proj.weight")
MISSPELT = rename("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_porj.weight")


def spoil(
    cases: Mapping[str, tuple[str, Callable[[Path], object], str]], root: Path, make: Callable[[str, Path], Path]
) -> list[Path]:
    """A checkpoint for each case; ``make`` makes those that are right."""
    whole = {name: make(name, root / name) for name in {case[0] for case in cases.values()}}
    folders = []
    for number, (name, change, _) in enumerate(cases.values()):
        folders.append(Path(shutil.copytree(whole[name], root / f"spoiled-{number}")))
        change(folders[-1])
    return folders
