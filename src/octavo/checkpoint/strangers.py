"""Folders that look like a model's and are none: adapters, pipelines of several models, folders of folders.

What they are is said by name, with what to do, instead of what is missing in them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..text import shown, some
from .files import read_object
from .modules import module_folders

ADAPTER_CONFIG = "adapter_config.json"
#: looked into for checkpoints, by somebody who gave the folder above them
_MAX_FOLDERS = 500
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: what trainers leave, that save each process's part -> what makes a model of it
_IN_PARTS = {
    "zero_to_fp32.py": "These are the parts of DeepSpeed's processes: make a model with zero_to_fp32.py.",
    ".metadata": "These are the parts of torch.distributed.checkpoint: save the model from the program that made them.",
}
#: how adapters become a model; peft's own names
MERGE = (
    "Merge it into its model first, and give the folder that comes of it: "
    "PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)."
)


def refuse_strangers(folder: Path) -> None:
    """Raise if the folder is an adapter's, a model's and an adapter's at once, or that of a pipeline."""
    names = {entry.name for entry in folder.iterdir()}
    if ADAPTER_CONFIG in names:
        weights = sorted(name for name in names if name.startswith("adapter_model."))
        model = sorted(name for name in names if name.endswith(".safetensors") and name not in weights)
        if not model:
            raise CheckpointError(
                f"{folder}: an adapter of peft, not a model: {_base(folder / ADAPTER_CONFIG)}. {MERGE}"
            )
        if weights:
            alone = f", or give {folder / model[0]}" if len(model) == 1 else ""
            raise CheckpointError(
                f"{folder}: holds a model ({model[0]}) and an adapter of peft ({weights[0]}, {ADAPTER_CONFIG}). "
                f"transformers applies the adapter if peft is installed, vLLM does not. {MERGE} To read the model "
                f"without it, move {ADAPTER_CONFIG} and {weights[0]} out of the folder{alone}."
            )
    if "model_index.json" in names:
        parts = [path.name for path in folders_of_weights(folder)]
        raise CheckpointError(
            f"{folder}: a pipeline of several models (model_index.json, of diffusers). Give the folder of one of them: "
            f"{some(parts) or 'none of them is here'}."
        )


def _base(config: Path) -> str:
    named: Any = None
    with contextlib.suppress(CheckpointError):  # it is an adapter, whatever its config looks like
        named = read_object(config, unique=False).get("base_model_name_or_path")
    return f"{config.name} says that it belongs to {shown(named)}" if named else f"it has an {config.name}"


def advice(path: Path) -> str:
    """What to do about a path where no checkpoint is."""
    names = [path.name] if path.is_file() else sorted(entry.name for entry in path.iterdir())
    below = [] if path.is_file() else folders_of_weights(path)
    transformer = [name for name in module_folders(path) if path / name in below]
    if transformer:
        return (
            f"Its modules.json (of sentence-transformers) says that the model is in {transformer[0]}: give "
            f"{path / transformer[0]}. To convert all, put the converted folder in its place, in a copy of {path}."
        )
    for name, what in _IN_PARTS.items():
        if name in names:
            return what
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when opened: octavo never does. Fetch the safetensors "
            "version, or convert it on a machine that you trust: AutoModel.from_pretrained(...).save_pretrained(...)."
        )
    if any(name.endswith(".gguf") for name in names):
        return "GGUF holds already quantized weights: fetch the bf16 safetensors version."
    if below:
        return f"There are some in folders below: give {some([str(folder) for folder in below], 'or')}."
    return "Give a folder with model.safetensors (or its shards and index), or one .safetensors file."


def folders_of_weights(folder: Path) -> list[Path]:
    """Folders in this one, and in those, which hold a .safetensors file; of very many, the first."""
    return [below for below in itertools.islice(_below(folder), _MAX_FOLDERS) if any(below.glob("*.safetensors"))]


def _below(folder: Path, depth: int = 2) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # of others, perhaps
        for below in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            yield below
            if depth > 1:
                yield from _below(below, depth - 1)
