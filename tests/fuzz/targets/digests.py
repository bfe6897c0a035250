"""``octavo-digests.json`` beside a sound shard, by which the shard is verified."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

import octavo
from octavo.checkpoint.digests import NAME

from ..jsontext import Object, tree_of
from ..mutator import Words
from .base import Target, shard_bytes

_SHARD = "model.safetensors"
_SIZES = {"model.layers.0.up.weight": 256, "model.norm.weight": 8}


class Digests(Target):
    """The text of the file."""

    name = "digests"
    share = 3
    words = Words(
        keys=("algorithm", "shards", "header", "tensors", _SHARD, *_SIZES),
        texts=("crc32", "crc32c", "00000000", "ffffffff", "DEADBEEF", _SHARD, *_SIZES),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        data = shard_bytes({name: ("U8", [nbytes], nbytes) for name, nbytes in _SIZES.items()})
        (folder / _SHARD).write_bytes(data)
        digests = {name: f"{zlib.crc32(bytes(nbytes)):08x}" for name, nbytes in _SIZES.items()}
        header = f"{zlib.crc32(data[: len(data) - sum(_SIZES.values())]):08x}"
        self.sound = {"algorithm": "crc32", "shards": {_SHARD: {"header": header, "tensors": digests}}}
        self.seeds = [*self.seeds, json.dumps(self.sound).encode()]

    def run(self, data: bytes) -> None:
        (self.folder / NAME).write_bytes(data)
        report = octavo.verify(self.folder, threads=1, progress=False)
        report.to_dict()
        recorded = json.loads(data)["shards"][_SHARD]
        assert report.ok == (recorded["tensors"] == self.sound["shards"][_SHARD]["tensors"]), f"it says {report.ok}"

    def repaired(self, tree: Any, random: Random) -> Any:
        """Half of the files are sound but for one part."""
        if not isinstance(tree, Object) or random.random() < 0.5:
            return tree
        sound = tree_of(self.sound)
        for key, value in tree[:: random.choice((1, 2))]:
            if isinstance(key, str) and random.random() < 0.3:
                sound.set(key, value)
        return sound
