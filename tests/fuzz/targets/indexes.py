"""``model.safetensors.index.json`` beside two sound shards."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import octavo
from octavo.checkpoint.checkpoint import Checkpoint

from ..jsontext import Object
from ..mutator import Words
from .base import INDEX, Target, shard_bytes

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_TENSORS = ("model.layers.0.up.weight", "model.layers.0.up.bias", "model.layers.1.up.weight", "model.norm.weight")


class Indexes(Target):
    """The text of an index."""

    name = "indexes"
    share = 15
    words = Words(
        keys=("metadata", "weight_map", "total_size", *_TENSORS),
        texts=(
            *_SHARDS,
            *_TENSORS,
            "model.safetensors",
            "other.safetensors",
            "folder.safetensors",
            "config.json",
            INDEX,
        ),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for number, shard in enumerate(_SHARDS):
            matrix, vector = _TENSORS[2 * number : 2 * number + 2]
            (folder / shard).write_bytes(shard_bytes({matrix: ("BF16", [2, 4], 16), vector: ("F32", [2], 8)}))
        (folder / "other.safetensors").write_bytes(b"no shard")
        (folder / "folder.safetensors").mkdir()

    def repaired(self, tree: Any, random: Random) -> Any:
        """A third of the indexes name every tensor's shard, whatever else they say."""
        if isinstance(tree, Object) and random.random() < 0.35:
            tree.set("weight_map", Object([name, _SHARDS[number // 2]] for number, name in enumerate(_TENSORS)))
        return tree

    def run(self, data: bytes) -> None:
        (self.folder / INDEX).write_bytes(data)
        checkpoint = Checkpoint.open(self.folder)
        where = {name: checkpoint.shard_of(name).path.name for name in checkpoint.tensors}
        said = set(json.loads(data)["weight_map"].values())
        held = {name: _SHARDS[number // 2] for number, name in enumerate(_TENSORS) if _SHARDS[number // 2] in said}
        assert where == held, f"the index was read as {where}"
        octavo.plan(self.folder, model=False).to_dict()
