"""A safetensors checkpoint, opened by reading headers only.

`Checkpoint.open` finds the files (a folder, a single file, or a hub id), reads every header (see `header`), and checks
that no tensor is in two shards and that an index agrees with the files. All problems are reported at once.

Weights are never read here, and nothing is ever unpickled.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MAX_PROBLEMS_SHOWN, CheckpointError, MissingExtraError, passes, raise_problems, reading
from ..text import shown, told
from .files import conforms, is_there, local_path, read_object
from .header import MAX_BYTES, MAX_HEADER_BYTES, MAX_TENSORS, Shard, TensorInfo, read_shard

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors$")
#: an index is no larger than the headers of its shards may be
_MAX_INDEX_BYTES = MAX_HEADER_BYTES
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """Names, dtypes, shapes and byte ranges of a checkpoint; no weights."""

    path: Path  # the folder, or the single file
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]  # config.json, or empty

    @classmethod
    def open(cls, path: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
        """Open a folder, a ``.safetensors`` file, or (when no such path exists) a hub id.

        Raises:
            CheckpointError: with every problem that the headers show, naming files and tensors.
            MissingExtraError: for a hub id without ``huggingface_hub``.
        """
        with reading(path):
            local = resolve(path, revision)
            problems: list[str] = []
            files, index = _find_files(local, problems)
            return cls._of(local, files, index, problems)

    @classmethod
    def open_files(cls, files: Sequence[Path]) -> Checkpoint:
        """Open exactly these files of one folder, without looking for an index. Errors as for `open`."""
        path = files[0] if len(files) == 1 else files[0].parent
        with reading(path):
            return cls._of(path, files, None, [])

    @classmethod
    def _of(cls, local: Path, files: Sequence[Path], index: dict[str, str] | None, problems: list[str]) -> Checkpoint:
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
                    problems.append(f"{file.name}: tensor {info.name!r} is also in {other}")
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
            problems += _compare_index(index, tensors, shards)
        raise_problems(CheckpointError, local, problems, "Nothing was loaded. Fetch the named files again.")
        return cls(local, tuple(shards), tensors, read_config(local))

    @property
    def folder(self) -> Path:
        """The folder that holds config and tokenizer files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def quantization(self) -> str | None:
        """The method that already quantized this checkpoint, from its config, or None."""
        config = self.config.get("quantization_config")
        return str(config.get("quant_method", "unknown")) if isinstance(config, dict) else None

    def by_shard(self) -> list[list[TensorInfo]]:
        """The tensors of each shard."""
        found: list[list[TensorInfo]] = [[] for _ in self.shards]
        for info in self.tensors.values():
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
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"],
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
    except Exception as error:  # the hub client has many; all mean the same here
        if passes(error):
            raise
        raise CheckpointError(
            f"{text}: no such file or folder here, and the hub did not give it: {told(error)}"
        ) from error


# -- finding the files ------------------------------------------------------------------------------------------------


def _find_files(path: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of ``path`` in reading order, and the index's weight map if there is one."""
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a .safetensors file. {_advice(path)}")
        return [path], None
    if is_there(path / INDEX_NAME):
        index = _read_index(path / INDEX_NAME, problems)
        files = []
        for name in sorted(set(index.values())):
            if (path / name).is_file():
                files.append(path / name)
            else:
                count = sum(file == name for file in index.values())
                problems.append(f"{INDEX_NAME}: names {name}, which is not in the folder ({count} tensors are in it)")
        return files, index
    if (path / SINGLE_NAME).exists():
        return [path / SINGLE_NAME], None
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        lone = SHARD_NAME.match(files[0].name)
        if lone is None or int(lone["count"]) == 1:
            return files, None
    if files:
        problems += _incomplete_numbering(files)
        return files, None
    raise CheckpointError(f"{path}: no .safetensors file here. {_advice(path)}")


def _advice(path: Path) -> str:
    names = [path.name] if path.is_file() else sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when opened: octavo never does. Fetch the safetensors "
            "version, or convert it on a machine that you trust: AutoModel.from_pretrained(...).save_pretrained(...)."
        )
    if any(name.endswith(".gguf") for name in names):
        return "GGUF holds already quantized weights: fetch the bf16 safetensors version."
    return "Give a folder with model.safetensors (or its shards and index), or one .safetensors file."


def _incomplete_numbering(files: list[Path]) -> list[str]:
    """Several files and no index: only a complete set ``x-00001-of-0000N`` is unambiguous."""
    matches = [SHARD_NAME.match(file.name) for file in files]
    if any(match is None for match in matches):
        return [f"{len(files)} .safetensors files and no {INDEX_NAME} that says which belong together: name one file"]
    found = [match for match in matches if match]
    if len({(match["stem"], match["count"]) for match in found}) > 1:
        return [f"the .safetensors files belong to several sets, and there is no {INDEX_NAME}"]
    present = {int(match["number"]) for match in found}
    first, count = found[0], int(found[0]["count"])
    width = len(first["number"])
    gone = (number for number in range(1, count + 1) if number not in present)
    # a file may claim to be one of billions
    named = [
        f"{first['stem']}-{number:0{width}d}-of-{first['count']}.safetensors: missing from the folder"
        for number in itertools.islice(gone, MAX_PROBLEMS_SHOWN - 1)
    ]
    more = count - sum(1 <= number <= count for number in present) - len(named)
    return [*named, f"{more:,} more are missing"] if more > 0 else named


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    weight_map: Any = read_object(path, _MAX_INDEX_BYTES).get("weight_map")
    if not conforms(weight_map, dict[str, str]):
        raise CheckpointError(f"{path}: not a valid index: weight_map must map tensor names to file names")
    # a name that leaves the folder could read (or, in a conversion, write) anything
    strays = {file for file in set(weight_map.values()) if Path(file).name != file or not file.endswith(".safetensors")}
    checked = {name: file for name, file in weight_map.items() if file not in strays}
    problems += [
        f"{path.name}: {name!r} points to {file!r}, which is no .safetensors file of this folder"
        for name, file in weight_map.items()
        if file in strays
    ]
    if not weight_map:
        problems.append(f"{path.name}: weight_map is empty")
    return checked


def _compare_index(index: dict[str, str], tensors: Mapping[str, TensorInfo], shards: list[Shard]) -> Iterable[str]:
    files = [shard.path.name for shard in shards]
    names = set(files)
    for name, file in index.items():
        if file not in names:
            continue  # the absent or unreadable file has been reported
        if name not in tensors:
            yield f"{INDEX_NAME}: says {name!r} is in {file}, but its header does not have it"
        elif files[tensors[name].shard] != file:
            yield f"{INDEX_NAME}: says {name!r} is in {file}, found in {files[tensors[name].shard]}"
    for name, info in tensors.items():
        if name not in index:
            yield f"{files[info.shard]}: holds {name!r}, which {INDEX_NAME} does not name"


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
