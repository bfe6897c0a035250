"""A safetensors checkpoint, opened by reading headers only.

``Checkpoint.open`` finds the files (a folder, a single file, or a hub id), reads every header, and validates what
the safetensors format demands before anyone touches data: header length, JSON without duplicate keys, known dtypes,
byte counts that match shapes, offsets without gaps or overlaps, a file that ends where the header says, no tensor
in two shards, an index that agrees with the files. All problems are reported at once.

Weights are never read here, and nothing is ever unpickled.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, MissingExtraError, SourceChangedError, raise_problems
from . import dtypes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: the limit of the reference implementation (safetensors' MAX_HEADER_SIZE)
MAX_HEADER_BYTES = 100_000_000
SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: where its bytes are, and what they mean."""

    name: str
    dtype_name: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    shard: int  # index into Checkpoint.shards
    offset: int  # absolute, in bytes from the start of the file
    nbytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype; an error for the few that torch lacks."""
        dtype = dtypes.TORCH[self.dtype_name]
        if dtype is None:
            raise CheckpointError(f"{self.name}: torch has no dtype for {self.dtype_name}")
        return dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def quantizable(self) -> bool:
        """bf16, fp16 or fp32."""
        return dtypes.TORCH[self.dtype_name] in dtypes.QUANTIZABLE


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint."""

    path: Path
    nbytes: int
    mtime_ns: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raise if the file is not the one that was opened."""
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise SourceChangedError(f"{self.path}: disappeared while being read ({error.strerror})") from error
        if (now.st_size, now.st_mtime_ns) != (self.nbytes, self.mtime_ns):
            raise SourceChangedError(
                f"{self.path}: changed since it was opened ({self.nbytes:,} bytes then, {now.st_size:,} now). "
                "Run again when nothing writes to the checkpoint."
            )


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
        local = resolve(path, revision)
        problems: list[str] = []
        files, index = _find_files(local, problems)
        return cls._of(local, files, index, problems)

    @classmethod
    def open_files(cls, files: Sequence[Path]) -> Checkpoint:
        """Open exactly these files of one folder, without looking for an index. Errors as for `open`."""
        path = files[0] if len(files) == 1 else files[0].parent
        return cls._of(path, files, None, [])

    @classmethod
    def _of(cls, local: Path, files: Sequence[Path], index: dict[str, str] | None, problems: list[str]) -> Checkpoint:
        shards: list[Shard] = []
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            shard, infos = _read_shard(file, len(shards), problems)
            if shard is None:
                continue
            shards.append(shard)
            for info in infos:
                if info.name in tensors:
                    other = shards[tensors[info.name].shard].path.name
                    problems.append(f"{file.name}: tensor {info.name!r} is also in {other}")
                tensors[info.name] = info
        if index is not None:
            problems += _compare_index(index, tensors, shards)
        raise_problems(CheckpointError, local, problems, "Nothing was loaded. Fetch the named files again.")
        return cls(local, tuple(shards), tensors, _read_config(local))

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

    def shard_of(self, name: str) -> Shard:
        return self.shards[self.tensors[name].shard]

    def check_unchanged(self) -> None:
        """Raise if any file is not the one that was opened."""
        for shard in self.shards:
            shard.check_unchanged()


def resolve(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local path of a checkpoint; a hub id is downloaded (safetensors, json and tokenizer files only)."""
    local = Path(path).expanduser()
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
        raise CheckpointError(
            f"{text}: no such file or folder here, and the hub did not give it: {type(error).__name__}: {error}"
        ) from error


# -- finding the files ------------------------------------------------------------------------------------------------


def _find_files(path: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The shards of ``path`` in reading order, and the index's weight map if there is one."""
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a .safetensors file. {_advice(path)}")
        return [path], None
    if (path / INDEX_NAME).exists():
        if not (path / INDEX_NAME).is_file():
            raise CheckpointError(f"{path / INDEX_NAME}: not a regular file")
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
    first = found[0]
    width = len(first["number"])
    return [
        f"{first['stem']}-{number:0{width}d}-of-{first['count']}.safetensors: missing from the folder"
        for number in range(1, int(first["count"]) + 1)
        if number not in present
    ]


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
        weight_map = index["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError("weight_map must map tensor names to file names")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a valid index: {type(error).__name__}: {error}") from error
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


def _read_config(path: Path) -> Mapping[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return config


# -- one file ---------------------------------------------------------------------------------------------------------


class _DuplicateKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(f"the key {key!r} appears twice")
            seen.add(key)
    return result


def _read_shard(path: Path, number: int, problems: list[str]) -> tuple[Shard | None, list[TensorInfo]]:
    """Read and validate one header; problems are appended, never raised, so that all files are heard."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError("not a regular file")
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{len(prefix)} bytes long, too short for a safetensors header")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"header too long: declares {header_bytes:,} bytes, the format allows {MAX_HEADER_BYTES:,}"
                )
            if header_bytes > stat.st_size - 8:
                raise CheckpointError(
                    f"header declares {header_bytes:,} bytes, the file holds {stat.st_size - 8:,} after its first "
                    "eight: incomplete, or not safetensors"
                )
            raw = file.read(header_bytes)
        entries, metadata = _parse_header(raw)
    except OSError as error:
        problems.append(f"{path.name}: can't be read: {error.strerror}")
        return None, []
    except CheckpointError as error:
        problems.append(f"{path.name}: {error}")
        return None, []
    shard = Shard(path, stat.st_size, stat.st_mtime_ns, metadata)
    base = 8 + header_bytes
    infos = []
    end = 0
    for name, entry in entries:
        try:
            dtype_name, shape, begin, stop = _parse_entry(entry)
            _check_extent(dtype_name, shape, begin, stop, end)
        except CheckpointError as error:
            problems.append(f"{path.name}: tensor {name!r}: {error}")
            end = max(end, _declared_end(entry))
            continue
        infos.append(TensorInfo(name, dtype_name, shape, number, base + begin, stop - begin))
        end = stop
    if base + end != stat.st_size:
        held = stat.st_size - base
        what = "the download is incomplete" if held < end else "bytes that no tensor owns follow"
        problems.append(f"{path.name}: header declares {end:,} data bytes, file holds {held:,}: {what}")
    return shard, infos


def _parse_header(raw: bytes) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Header bytes -> entries in the order of their offsets, and the metadata."""
    if not raw.startswith(b"{"):
        raise CheckpointError("header does not start with '{': not a safetensors file")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"header: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"header is not valid JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("header: __metadata__ must map strings to strings")
    return sorted(header.items(), key=lambda item: (_declared_begin(item[1]), _declared_end(item[1]))), metadata


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("an entry must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in dtypes.BITS:
        raise CheckpointError(f"unknown dtype {dtype_name!r}; known: {', '.join(dtypes.BITS)}")
    if not isinstance(shape, list) or not all(_is_natural(n) for n in shape):
        raise CheckpointError(f"shape {shape!r} is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_natural(n) for n in offsets):
        raise CheckpointError(f"data_offsets {offsets!r} are not two non-negative integers")
    return dtype_name, tuple(shape), offsets[0], offsets[1]


def _check_extent(dtype_name: str, shape: tuple[int, ...], begin: int, stop: int, previous_end: int) -> None:
    if stop < begin:
        raise CheckpointError(f"data_offsets end at {stop:,} before they begin at {begin:,}")
    bits = math.prod(shape) * dtypes.BITS[dtype_name]
    if bits % 8 or bits // 8 != stop - begin:
        raise CheckpointError(
            f"{dtype_name} {list(shape)} takes {bits / 8:,.10g} bytes, data_offsets give {stop - begin:,}"
        )
    if begin < previous_end:
        raise CheckpointError(f"overlaps the tensor before it: begins at {begin:,}, that one ends at {previous_end:,}")
    if begin > previous_end:
        raise CheckpointError(f"{begin - previous_end:,} bytes before it belong to no tensor (a gap)")


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _declared(entry: Any, position: int) -> int:
    try:
        value = entry["data_offsets"][position]
    except (TypeError, KeyError, IndexError):
        return 0
    return value if _is_natural(value) else 0


def _declared_begin(entry: Any) -> int:
    return _declared(entry, 0)


def _declared_end(entry: Any) -> int:
    return _declared(entry, 1)
