"""Tiny checkpoints as they are published, where transformers saves something else than engines know.

Configs on the hub have fields that transformers' own lack, and vision towers a level of names that it left out since.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

#: model type -> fields of published configs
_FIELDS: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "kimi_k2": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
_TOWER = re.compile(r"(?<=vision_tower\.)(?=embeddings\.|encoder\.|post_layernorm\.|pre_layrnorm\.|head\.)")


def add_fields(folder: Path, model_type: str) -> None:
    """What published configs of a type say more."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(_FIELDS.get(model_type, {}) | config))


def respell(folder: Path) -> Iterator[str]:
    """Give tensors other names, as they are called on the hub, one way after another; yields what it did."""
    for what, rename in (("vision_tower.vision_model", _with_vision_model),):
        if _rename(folder, rename):
            yield what


def _with_vision_model(name: str) -> str:
    return _TOWER.sub("vision_model.", name)


def _rename(folder: Path, rename: Callable[[str], str]) -> bool:
    changed = False
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        named = {rename(name): tensor for name, tensor in tensors.items()}
        if named.keys() != tensors.keys():
            save_file(named, file, metadata={"format": "pt"})
            changed = True
    index = folder / "model.safetensors.index.json"
    if changed and index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    return changed
