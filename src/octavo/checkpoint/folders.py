"""Which files of a folder are the checkpoint: one file, or the shards that an index or their numbers hold together."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import MAX_PROBLEMS_SHOWN, CheckpointError
from .files import conforms, is_there, read_object
from .header import MAX_HEADER_BYTES, Shard, TensorInfo

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors$")
#: an index is no larger than the headers of its shards may be
_MAX_INDEX_BYTES = MAX_HEADER_BYTES
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_files(path: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
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


def compare_index(index: dict[str, str], tensors: Mapping[str, TensorInfo], shards: list[Shard]) -> Iterable[str]:
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
