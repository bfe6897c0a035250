"""The files of a checkpoint beside its weights: which of them a conversion copies, and what it may read.

Whoever made a checkpoint may have put a link into it that leads to any file of whoever converts it, who then passes on
the result. So a link is followed only within the checkpoint: its folder, and the folders in which its weights lie (a
cache of the hub keeps all files in one, and links to them).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.digests import NAME as DIGESTS_NAME
from ..checkpoint.files import Identity, open_regular
from ..errors import CheckpointError, SourceChangedError, reason
from .folder import Folder, permissions

#: weights in other forms, which can be as large as the model; and the index and digests, which are written anew
_NOT_COPIED = (
    DIGESTS_NAME,
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".ot", ".npz", ".tflite"),
)


class SmallFile(NamedTuple):
    """A file that is to be copied, as it was when the conversion was planned."""

    path: Path
    identity: Identity
    mode: int

    def copy(self, folder: Folder) -> None:
        """Copy it into a folder; raises if it is not what it was."""
        changed = SourceChangedError(f"{self.path}: changed since it was opened. Run again when nothing writes to it.")
        try:
            source = open_regular(self.path)
        except OSError as error:
            raise SourceChangedError(f"{self.path}: can't be read any more: {reason(error)}") from error
        with source, folder.new_file(self.path.name, self.mode) as copy:
            if Identity.of(os.fstat(source.fileno())) != self.identity:
                raise changed
            shutil.copyfileobj(source, copy)
            if Identity.of(os.fstat(source.fileno())) != self.identity or copy.tell() != self.identity.nbytes:
                raise changed


def find_small_files(checkpoint: Checkpoint) -> tuple[tuple[SmallFile, ...], list[str]]:
    """The files that are copied as they are (of the tokenizer, and the like), and remarks about others.

    Raises:
        CheckpointError: the config is a link that leads out of the checkpoint.
    """
    found: list[SmallFile] = []
    outside: list[str] = []
    if not checkpoint.path.is_dir() and not checkpoint.config:
        return (), []  # a lone file: what lies beside it is not ours
    inside = _Inside(checkpoint)
    for entry in sorted(checkpoint.folder.iterdir()):
        if not entry.is_file() or entry.name.startswith(".") or entry.name.endswith(_NOT_COPIED):
            continue
        ours = inside.holds(entry)
        if entry.name == "config.json" and checkpoint.config:
            if not ours:
                raise CheckpointError(
                    f"{entry}: a link that leads out of the checkpoint, to {entry.resolve()}. Put a copy in its place, "
                    "if that is what you mean."
                )
        elif ours:
            found.append(SmallFile(entry, Identity.of(entry.stat()), permissions(entry)))
        else:
            outside.append(entry.name)
    notes = [f"links that lead out of the checkpoint are not copied: {', '.join(outside)}"] if outside else []
    return tuple(found), notes


class _Inside:
    """What belongs to a checkpoint, wherever links lead."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder.resolve()
        self._beside_weights = {shard.path.resolve().parent for shard in checkpoint.shards}

    def holds(self, entry: Path) -> bool:
        path = entry.resolve()
        return path.is_relative_to(self._folder) or path.parent in self._beside_weights
