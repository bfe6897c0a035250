"""A safetensors checkpoint, opened by reading headers only.

`Checkpoint.open` finds the files (a folder, a single file, or a hub id; see `folders`), reads every header (see
`header`), and checks that no tensor is in two shards. All problems are reported at once. What is odd and does no harm
is a note: an index that says otherwise than the headers, files that are not read, names of wrappers.

Weights are never read here, and nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingExtraError, passes, raise_problems, reading
from ..text import shown, told
from .codings import Codings, find_codings
from .declared import Contradiction
from .files import conforms, is_there, local_path, read_object
from .folders import Found, compare_index, find_files
from .header import MAX_BYTES, MAX_TENSORS, Shard, TensorInfo, read_shard
from .names import check_no_adapter, unwrapped
from .quantized import Quantization, find_quantization, undeclared
from .shapes import shape_in, with_shapes

#: what a config may call its dtype -> the dtype of weights that are decoded, where it is not bf16
_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Checkpoint:
    """Names, dtypes, shapes and byte ranges of a checkpoint; no weights."""

    path: Path  # the folder, or the single file
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]  # config.json, or empty
    notes: tuple[str, ...] = ()  # what is odd, for whoever uses it
    #: names in the files -> those of tensors, if another; scales and the like have that of their weight
    renamed: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()  # what the index names, and no shard holds
    left_out: Mapping[str, str] = field(default_factory=dict)  # of its source, by `decoded` -> what it is
    source: Checkpoint | None = None  # as it is in the files, if tensors and config are those of `decoded`

    @classmethod
    def open(cls, path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
        """Open a folder, a ``.safetensors`` file, or (when no such path exists) a hub id.

        Raises:
            CheckpointError: with every problem that the headers show, naming files and tensors.
            MissingExtraError: for a hub id without ``huggingface_hub``.
        """
        with reading(path):
            local = resolve(path, revision)
            config = read_config(local)
            return cls._of(local, find_files(local, config), config)

    @classmethod
    def open_chosen(cls, files: Sequence[Path]) -> Checkpoint:
        """Open the files of one folder that a reader has chosen. Errors as for `open`.

        Where `open` would choose the same, or finds two checkpoints in the folder, it is as if the folder were opened.
        """
        path = files[0] if len(files) == 1 else files[0].parent
        with reading(path):
            config = read_config(path)
            found = find_files(files[0].parent, config)
            return cls._of(path, found if found.files == sorted(files) else Found(path.name, list(files)), config)

    @classmethod
    def open_files(cls, files: Sequence[Path]) -> Checkpoint:
        """Open exactly these files of one folder, without looking for an index. Errors as for `open`."""
        path = files[0] if len(files) == 1 else files[0].parent
        with reading(path):
            return cls._of(path, Found(path.name, list(files)), read_config(path))

    @classmethod
    def _of(cls, local: Path, found: Found, config: Mapping[str, Any]) -> Checkpoint:
        files, index, problems, notes = found.files, found.index, list(found.problems), list(found.notes)
        shards: list[Shard] = []
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            shard, infos = read_shard(file, len(shards), problems)
            if shard is None:
                continue
            shards.append(shard)
            for info in infos:
                if info.name in tensors:
                    other = shards[tensors[info.name].shard].path.name
                    twice = f"{file.name}: tensor {info.name!r} is also in {other}"
                    # readers take the last one: where the index does, too, nobody takes the other
                    agreed = index is not None and index.get(info.name) == file.name
                    (notes if agreed else problems).append(f"{twice}{', and not read from there' if agreed else ''}")
                tensors[info.name] = info
            if len(tensors) > MAX_TENSORS:
                raise CheckpointError(
                    f"{local}: {len(tensors):,} tensors in {len(shards):,} of {len(files):,} files; octavo reads "
                    f"checkpoints of at most {MAX_TENSORS:,}"
                )
        total_bytes = sum(info.nbytes for info in tensors.values())
        if total_bytes > MAX_BYTES:
            problems.append(f"{total_bytes:,} bytes in all; octavo reads checkpoints of at most {MAX_BYTES:,}")
        if index is not None:
            notes += compare_index(found, tensors, shards)
        named, remarks = unwrapped(tensors, config, problems)
        raise_problems(
            CheckpointError,
            local,
            problems,
            "Nothing was loaded. Files that are incomplete or missing have to be fetched again.",
        )
        check_no_adapter(local, named)
        renamed = {old: new for old, new in zip(tensors, named, strict=True) if old != new}
        absent = tuple(name for name in index or () if name not in tensors)
        return cls(local, tuple(shards), named, config, (*notes, *remarks), renamed, absent)

    @property
    def folder(self) -> Path:
        """The folder that holds config and tokenizer files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return sum(info.nbytes for info in self.stored.values())

    @functools.cached_property
    def quantization(self) -> Quantization | None:
        """By what this checkpoint is quantized already, whatever tells it; None if it is not."""
        found = None if self.source else find_quantization(self.folder, self.config, self.tensors)
        return found and replace(found, undecoded=self._codings[0].refused)

    @property
    def stored(self) -> Mapping[str, TensorInfo]:
        """The tensors that are in the files, whatever they stand for."""
        return self.tensors if self.source is None else self.source.tensors

    @property
    def stored_config(self) -> Mapping[str, Any]:
        """What config.json holds, declarations included."""
        return self.config if self.source is None else self.source.config

    def decoded(self) -> Checkpoint:
        """The checkpoint of weights that one which is quantized already stands for; itself, if that is not known.

        Its tensors are what codes, scales and the like make together (see `codings`), its config declares nothing.

        Raises:
            CheckpointError: what is declared and what the headers say contradict each other.
        """
        found, problems = self._codings
        raise_problems(CheckpointError, self.path, problems, "It can't be told what its weights are.")
        if not found.by_name:
            return self
        names = {coding.codes.name: name for name, coding in found.by_name.items()}
        tensors: dict[str, TensorInfo] = {}
        dtype_name = _DTYPES.get(str(self.config.get("dtype") or self.config.get("torch_dtype")), "BF16")
        for info in self.tensors.values():
            if info.name in names:
                name, coding = names[info.name], found.by_name[names[info.name]]
                tensors[name] = replace(info, name=name, dtype_name=dtype_name, shape=coding.shape, coding=coding)
            elif info.name not in found.consumed:
                tensors[info.name] = info
        used = {part.name for coding in found.by_name.values() for part in (*coding.stored, coding.shape_info) if part}
        left_out = {name: what for name, what in found.consumed.items() if name not in used}
        # what belongs to no weight (scales of a cache) is counted to any
        parts = dict.fromkeys(found.consumed, next(iter(found.by_name)))
        parts |= {part.name: coding.name for coding in found.by_name.values() for part in coding.stored}
        in_files = {new: old for old, new in self.renamed.items()}
        renamed = {in_files.get(name, name): parts.get(name, name) for name in self.tensors}
        renamed = {old: new for old, new in renamed.items() if old != new}
        config = undeclared(self.config)
        return replace(self, tensors=tensors, config=config, renamed=renamed, left_out=left_out, source=self)

    @property
    def contradictions(self) -> tuple[Contradiction, ...]:
        """What config and headers contradict each other about, of weights that are quantized already."""
        return () if self.source else tuple(self._codings[1])

    @functools.cached_property
    def _codings(self) -> tuple[Codings, list[Contradiction]]:
        """What is quantized already, and what keeps it from being told."""
        problems: list[Contradiction] = []
        with reading(self.path):
            shape_of = functools.partial(shape_in, shards=self.shards)
            found = find_codings(self.folder, self.config, self.tensors, problems, shape_of)
            found = with_shapes(found, self.shards, problems)
        problems += (
            Contradiction(
                f"{coding.name} is there twice: as it is, and as {coding.codes.name} with its scales", coding.name
            )
            for coding in found.by_name.values()
            if coding.codes.name != coding.name and coding.name in self.tensors
        )
        return found, problems

    def by_shard(self) -> list[list[TensorInfo]]:
        """The tensors of each shard, as they are stored."""
        found: list[list[TensorInfo]] = [[] for _ in self.shards]
        for info in self.stored.values():
            found[info.shard].append(info)
        return found

    def shard_of(self, name: str) -> Shard:
        return self.shards[self.tensors[name].shard]

    def check_unchanged(self) -> None:
        """Raise if any file is not the one that was opened."""
        for shard in self.shards:
            shard.check_unchanged()


def resolve(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local path of a checkpoint; a hub id is downloaded (safetensors, json and tokenizer files only)."""
    local = local_path(path)
    if local.exists():
        if revision is not None:
            raise CheckpointError(f"{local}: revision={revision!r} is for hub ids; this is a local path")
        return local
    text = os.fspath(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith("."):
        raise CheckpointError(f"{text}: no such file or folder (and no hub id, which looks like org/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("hub", f"{text} is no local path; loading it from the hub") from None
    try:
        return Path(
            snapshot_download(
                text,
                revision=revision,
                allow_patterns=[
                    *("*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"),
                    "[1-9]*_*/*.bin",  # of modules of sentence-transformers, which are copied and never opened
                ],
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
    except Exception as error:  # the hub client has many; all mean the same here
        if passes(error):
            raise
        raise CheckpointError(
            f"{text}: no such file or folder here, and the hub did not give it: {told(error)}"
        ) from error


def read_config(path: Path) -> Mapping[str, Any]:
    """What config.json holds, beside a shard or in a folder; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not is_there(file):
        return {}
    # of a key that is there twice, the last counts, as it does for whoever else reads a config
    config = read_object(file, unique=False)
    quantization = config.get("quantization_config")
    if not conforms(quantization, dict[str, Any] | None):
        raise CheckpointError(f"{file}: quantization_config must be an object, not {shown(quantization)}")
    if quantization and not conforms(quantization.get("quant_method"), str | None):
        raise CheckpointError(f"{file}: quant_method must be a text, not {shown(quantization['quant_method'])}")
    return config
