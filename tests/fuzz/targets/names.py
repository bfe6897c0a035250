"""Names that others chose, of folders, files and tensors: found, counted, and shown on a terminal."""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from pathlib import Path
from random import Random
from typing import Any

import octavo
from octavo.planning.kinds import default_keep

from ..jsontext import Object
from ..mutator import Words
from .base import INDEX, Target, shard_bytes

_MOST_FILES = 8


class Names(Target):
    """``{"folder": name, "files": {name: [tensors]}, "index": whether there is one}`` as JSON."""

    name = "names"
    share = 10
    words = Words(
        keys=(
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model-00001-of-99999999999.safetensors",
            "a-000001-of-000001.safetensors",
            "pytorch_model.bin",
            "model.gguf",
            "config.json",
        ),
        texts=(
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.experts.1.down_proj.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.norm.weight",
            "layers.0.block_sparse_moe.gate.weight",
            "transformer.h.0.attn.c_attn.weight",
            "llama [fp16]",
            "a [/b]",
        ),
    )

    def run(self, data: bytes) -> None:
        folder = self._place(_scene(data))
        plan = octavo.plan(folder, model=False)
        json.dumps(plan.to_dict()).encode()
        for name in plan.placements:
            default_keep(name.name)
        if zlib.crc32(data) % 8 == 0:  # tables cost more
            table = plan.table()
            assert table.replace("\n", "").isprintable(), "a table has characters that can't be printed"

    def mutated(self, data: bytes, random: Random) -> bytes:
        changed = super().mutated(data, random)
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(json.loads(changed), dict):
                return changed
        return data

    def repaired(self, tree: Any, random: Random) -> Any:
        # mostly a folder that can be opened, whatever its names: each tensor once, in a complete set of files
        if isinstance(tree, Object) and random.random() < 0.3:
            tree.set("index", random.random() < 0.5)
        return tree

    def tidy(self) -> None:
        for entry in self.folder.iterdir():
            shutil.rmtree(entry)

    def _place(self, scene: dict[str, Any]) -> Path:
        """The folder of a scene; of names that no file can have, another."""
        folder = self._made(self.folder, scene.get("folder"), "model")
        files = scene.get("files")
        index = {}
        for name, tensors in list(files.items() if isinstance(files, dict) else ())[:_MOST_FILES]:
            names = [tensor for tensor in tensors if isinstance(tensor, str)] if isinstance(tensors, list) else []
            names = [tensor for tensor in names if tensor != "__metadata__"]
            index.update(dict.fromkeys(names, name))
            with contextlib.suppress(OSError, ValueError):
                file = folder / name
                if file.parent == folder:
                    file.write_bytes(shard_bytes(dict.fromkeys(names, ("BF16", [2, 4], 16))))
        if scene.get("index"):
            (folder / INDEX).write_text(json.dumps({"weight_map": index}))
        return folder

    def _made(self, parent: Path, name: Any, otherwise: str) -> Path:
        if isinstance(name, str):
            with contextlib.suppress(OSError, ValueError):
                folder = parent / name
                if folder.parent == parent and name != "..":
                    folder.mkdir()
                    return folder
        (parent / otherwise).mkdir()
        return parent / otherwise


def _scene(data: bytes) -> dict[str, Any]:
    """What the bytes describe; those that describe nothing are the name of a tensor."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(scene := json.loads(data), dict):
            return scene
    return {"files": {"model.safetensors": [data.decode("utf-8", "surrogateescape")]}}
