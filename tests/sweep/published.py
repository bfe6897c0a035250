"""Tiny checkpoints as they are published, where transformers saves something else than engines know.

Configs on the hub have fields that transformers' own lack, vision towers a level of names that it left out since, and
some stacks of experts are [experts, in, out].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: model type -> fields of published configs
_FIELDS: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gte": {"position_embedding_type": "rope"},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "hy_v3": {"first_k_dense_replace": 1},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "glm4v_moe_text": {"use_qk_norm": False},
    "minimax_m2": {"scoring_func": "sigmoid"},
    "xlm-roberta": {"position_embedding_type": "absolute"},
    "kimi_k2": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
#: those whose configs give the size of a head, which is that of all heads by their number
_HEAD_DIM = ("glm4_moe", "glm4v_moe_text")
#: those that give a side which is that of a head, or of all
_SIDES = {"lfm2": "block_dim", "minimax_m2": "rotary_dim"}
_STACK = ".experts."
_TOWER = re.compile(r"(?<=vision_tower\.)(?=embeddings\.|encoder\.|post_layernorm\.|pre_layrnorm\.|head\.)")


def add_fields(folder: Path) -> None:
    """Say in config.json, and in the configs within it, what published ones say more."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        kind = part.get("model_type")
        part.update({key: value for key, value in _FIELDS.get(kind, {}).items() if part.get(key) is None})
        if kind in _HEAD_DIM and part.get("head_dim") is None:
            part["head_dim"] = part["hidden_size"] // part["num_attention_heads"]
        if kind in _SIDES:
            part.setdefault(_SIDES[kind], part.get("head_dim") or part["hidden_size"])
        if part is not config and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # which generates, in a model that does
            part["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    path.write_text(json.dumps(config))


def respell(folder: Path) -> Iterator[str]:
    """Give tensors other names or layouts, as they are on the hub, one way after another; yields what it did."""
    for what, rename in (("vision_tower.vision_model", _with_vision_model),):
        if _rename(folder, rename):
            yield what
    if _transpose_stacks(folder):
        yield "experts as [in, out]"


def _with_vision_model(name: str) -> str:
    return _TOWER.sub("vision_model.", name)


def _transpose_stacks(folder: Path) -> bool:
    changed = False
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        stacks = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items() if t.ndim == 3 and _STACK in name}
        if stacks:
            save_file({**tensors, **stacks}, file, metadata={"format": "pt"})
            changed = True
    return changed


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
