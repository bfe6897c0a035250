"""The files of a checkpoint beside its weights: which of them a conversion copies, and what it may read.

Folders below are not copied, but for those that modules.json names: what follows on a model of sentence-transformers,
such as pooling, with its weights, which stay as they are.

Whoever made a checkpoint may have put a link into it that leads to any file of whoever converts it, who then passes on
the result. So a link is followed only within the checkpoint: its folder, and the folders in which its weights lie (a
cache of the hub keeps all files in one, and links to them).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.digests import NAME as DIGESTS_NAME
from ..checkpoint.files import Identity, open_regular
from ..checkpoint.modules import MODULES_NAME, leads_out, module_folders
from ..checkpoint.quantized import declaring_files
from ..checkpoint.strangers import ADAPTER_CONFIG
from ..errors import CheckpointError, SourceChangedError, reason
from ..text import some
from .folder import Folder, permissions

#: weights in other forms, which can be as large as the model; and the index and digests, which are written anew
_NOT_COPIED = (
    DIGESTS_NAME,
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".ot", ".npz", ".tflite"),
)
#: in folders that modules.json names
_MAX_FILES = 1000


class SmallFile(NamedTuple):
    """A file that is to be copied, as it was when the conversion was planned."""

    path: Path
    identity: Identity
    mode: int
    #: names and modes of the folders in which it lies, from that of the checkpoint on
    folders: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, path: Path, folders: tuple[Path, ...] = ()) -> SmallFile:
        modes = tuple((folder.name, permissions(folder) | stat.S_IRWXU) for folder in folders)
        return cls(path, Identity.of(path.stat()), permissions(path), modes)

    @property
    def name(self) -> str:
        """Its path from the folder of the checkpoint."""
        return "/".join([*(name for name, _ in self.folders), self.path.name])

    def copy(self, folder: Folder) -> None:
        """Copy it into a folder, or into those below that it lies in; raises if it is not what it was."""
        with contextlib.ExitStack() as stack:
            for name, mode in self.folders:
                folder = stack.enter_context(folder.below(name, mode))
            self._copy(folder)

    def _copy(self, folder: Folder) -> None:
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
    notes: list[str] = []
    if not checkpoint.path.is_dir() and not checkpoint.stored_config:
        return (), []  # a lone file: what lies beside it is not ours
    inside = _Inside(checkpoint)
    declaring = () if checkpoint.source is None else tuple(declaring_files(checkpoint.folder))
    for entry in sorted(checkpoint.folder.iterdir()):
        if not entry.is_file() or entry.name.startswith(".") or entry.name.endswith(_NOT_COPIED):
            continue
        ours = inside.holds(entry)
        if entry.name == "config.json" and checkpoint.stored_config:
            if not ours:
                raise CheckpointError(
                    f"{entry}: a link that leads out of the checkpoint, to {entry.resolve()}. Put a copy in its place, "
                    "if that is what you mean."
                )
        elif entry.name in declaring:
            notes.append(f"{entry.name} is not copied: it declares how the source is quantized")
        elif entry.name == ADAPTER_CONFIG:
            notes.append(f"{ADAPTER_CONFIG} is not copied: readers would look for its adapter")
        elif ours:
            found.append(SmallFile.of(entry))
        else:
            outside.append(entry.name)
    named = [path for path in module_folders(checkpoint.folder) if not leads_out(path)]
    for file in _of_modules(checkpoint.folder, named):
        if inside.holds(file.path):
            found.append(file)
        else:
            outside.append(file.name)
    if outside:
        notes.append(f"links that lead out of the checkpoint are not copied: {', '.join(outside)}")
    if copied := [path for path in named if any(file.name.startswith(f"{path}/") for file in found)]:
        notes.append(f"copied as they are, since {MODULES_NAME} names them: {some(copied)}")
    return tuple(found), notes


def _of_modules(folder: Path, named: list[str]) -> Iterator[SmallFile]:
    """All visible files of the folders that modules.json names, as far as they are there."""
    for top in dict.fromkeys(path.partition("/")[0] for path in named):
        if os.path.islink(folder / top) or not os.path.isdir(folder / top):  # which take any name
            continue
        files = list(itertools.islice((folder / top).rglob("*"), _MAX_FILES + 1))
        if len(files) > _MAX_FILES:
            raise CheckpointError(f"{folder / top}: holds more than {_MAX_FILES:,} files, and {MODULES_NAME} names it")
        for file in sorted(files):
            parts = file.relative_to(folder).parts
            within = any(file.is_relative_to(folder / name) for name in named)
            if within and file.is_file() and not any(part.startswith(".") for part in parts):
                parents = (folder.joinpath(*parts[:number]) for number in range(1, len(parts)))
                yield SmallFile.of(file, tuple(parents))


class _Inside:
    """What belongs to a checkpoint, wherever links lead."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder.resolve()
        self._beside_weights = {shard.path.resolve().parent for shard in checkpoint.shards}

    def holds(self, entry: Path) -> bool:
        path = entry.resolve()
        return path.is_relative_to(self._folder) or path.parent in self._beside_weights
