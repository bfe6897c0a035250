"""A converted checkpoint, which may be anything, verified against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors

import octavo

from .base import corpus, shard_bytes
from .headers import Headers

_SOURCE = {
    "model.layers.0.up.weight": ("BF16", (4, 32), 256),
    "model.layers.0.down.weight": ("F32", (3, 64), 768),
    "model.norm.weight": ("BF16", (4,), 8),
}
_SOUND = ("channel", "block", "tensor", "mxfp8", "fp8")


class Results(Headers):
    """A whole file, as for headers."""

    name = "results"
    share = 3
    new = 0.05

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source = folder / "source.safetensors"
        self.source.write_bytes(shard_bytes(_SOURCE))
        files = {file.stem: file.read_bytes() for file in corpus(self.name)}
        # a copy of the source holds what it should, too: nothing was quantized
        self.sound = [_tensors(files[stem]) for stem in (*_SOUND, "source")]
        self.run(files["channel"])  # imports what takes a second

    def run(self, data: bytes) -> None:
        self.file.write_bytes(data)
        report = octavo.verify(self.file, self.source, threads=1, progress=False)
        report.to_dict()
        held = _tensors(data)
        assert report.ok or held not in self.sound, f"verify finds a difference in {held}"
        known = all(any(sound.get(name) == tensor for sound in self.sound) for name, tensor in held.items())
        assert known or not report.ok, f"verify finds no difference in {held}"

    def content(self, data: bytes, nbytes: int) -> bytes:
        """The bytes that were there, or zeros."""
        return data[8 + int.from_bytes(data[:8], "little") :][:nbytes].ljust(nbytes, b"\0")


def _tensors(data: bytes) -> dict[str, Any]:
    """Name -> (dtype, shape, bytes), as the safetensors library reads a file."""
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)}
