"""Which files of a folder are the checkpoint: one file, or the shards that an index or their numbers hold together.

A folder may hold two, as trainers leave them that save twice: an index with its shards, and a file beside them. Readers
then differ (transformers takes the file, vLLM what the index names), so one is taken only if it alone is complete.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MAX_PROBLEMS_SHOWN, CheckpointError
from ..text import some
from .files import conforms, is_there, read_object
from .header import MAX_HEADER_BYTES, Shard, TensorInfo, read_shard
from .strangers import advice, refuse_strangers

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
#: of config.json: the file, or the index, that transformers takes instead
WEIGHTS_KEY = "transformers_weights"
SHARD_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors$")
#: an index is no larger than the headers of its shards may be
_MAX_INDEX_BYTES = MAX_HEADER_BYTES


@dataclass
class Found:
    """The files of a checkpoint, in the order of reading."""

    name: str  # what holds them together: the index, or one of them
    files: list[Path]
    index: Mapping[str, str] | None = None  # tensor -> file
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def is_complete(self) -> bool:
        """Read all headers, and return True if nothing is wrong with this one."""
        for number, file in enumerate(self.files):
            read_shard(file, number, self.problems)
        return not self.problems

    def __str__(self) -> str:
        return self.name if self.index is None else f"{self.name} with its {len(self.files)} files"


def find_files(path: Path, config: Mapping[str, Any]) -> Found:
    """The shards of ``path``, which has that config.

    Raises:
        CheckpointError: there are none, or the folder holds something else, or two checkpoints.
    """
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a .safetensors file. {advice(path)}")
        return Found(path.name, [path])
    refuse_strangers(path)
    candidates = _named(path, config.get(WEIGHTS_KEY)) or _candidates(path)
    found = _the_complete_one(path, candidates) if len(candidates) > 1 else candidates[0]
    others = sorted({file.name for file in path.glob("*.safetensors")} - {file.name for file in found.files})
    if others and not found.problems:
        why = "which it does not name" if found.index is not None else "which other readers may take, too"
        found.notes.append(f"{found.name} is read, and not {some(others)}, {why}")
    return found


def _named(folder: Path, name: Any) -> list[Found]:
    """What a config names, if it is there."""
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        return []
    if name.endswith(".safetensors.index.json"):
        return [_by_index(folder, name)]
    return [Found(name, [folder / name])] if name.endswith(".safetensors") else []


def _candidates(folder: Path) -> list[Found]:
    """What readers may take for the checkpoint; that of transformers first."""
    single, found = folder / SINGLE_NAME, []
    if is_there(folder / INDEX_NAME):
        found.append(_by_index(folder, INDEX_NAME))
        if single in found[0].files:
            return found
    if single.exists():
        if not found:
            shards = [file for file in folder.glob("model-*.safetensors") if _stem(file) == "model"]
            found += [_by_number(shards)] if shards else []
        found.insert(0, Found(SINGLE_NAME, [single]))
    return found or [_by_number(sorted(folder.glob("*.safetensors")), folder)]


def _the_complete_one(folder: Path, candidates: Sequence[Found]) -> Found:
    """Of a file and shards beside it, the one that is complete."""
    complete = [found for found in candidates if found.is_complete()]
    if len(complete) > 1:
        single, other = candidates
        raise CheckpointError(
            f"{folder}: holds two checkpoints, {single} and {other}. transformers reads the first, vLLM the "
            f"{'second' if other.index else 'files of both'}. Move the one that you don't mean out of the folder; or "
            f"give {folder / SINGLE_NAME}."
        )
    if complete:
        other = next(found for found in candidates if found is not complete[0])
        more = f" ({len(other.problems):,} problems in all)" if other.problems[1:] else ""
        complete[0].notes.append(f"{other.name} is not complete, and not read: {other.problems[0]}{more}")
        return complete[0]
    single, other = candidates
    single.problems += other.problems
    return single


def _by_number(files: list[Path], folder: Path | None = None) -> Found:
    """A lone file, or those that are numbered."""
    files = sorted(files)
    if not files:
        assert folder is not None
        raise CheckpointError(f"{folder}: no .safetensors file here. {advice(folder)}")
    lone = SHARD_NAME.match(files[0].name)
    if len(files) == 1 and (lone is None or int(lone["count"]) == 1):
        return Found(files[0].name, files)
    return Found(files[0].name, files, problems=_incomplete_numbering(files))


def _stem(file: Path) -> str | None:
    match = SHARD_NAME.match(file.name)
    return match["stem"] if match else None


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


# -- the index --------------------------------------------------------------------------------------------------------


def _by_index(folder: Path, name: str) -> Found:
    found = Found(name, [])
    index = found.index = _read_index(folder / name, found.problems)
    for shard in sorted(set(index.values())):
        if (folder / shard).is_file():
            found.files.append(folder / shard)
        else:
            count = sum(file == shard for file in index.values())
            found.problems.append(f"{name}: names {shard}, which is not in the folder ({count} tensors are in it)")
    if index and not found.files:
        rest = sorted(folder.glob("*.safetensors"))
        if len(rest) > 1 and not _incomplete_numbering(rest):
            found.problems.append(
                f"{rest[0].name} and the {len(rest) - 1} numbered like it are complete: to read these, remove the "
                "index, which is not theirs"
            )
    return found


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


def compare_index(found: Found, tensors: Mapping[str, TensorInfo], shards: list[Shard]) -> Iterable[str]:
    """What an index says otherwise than the headers. All readers go by the headers, once they have the files."""
    index = found.index or {}
    files = [shard.path.name for shard in shards]
    absent = [name for name in index if name not in tensors]
    if absent:
        yield f"{found.name} names tensors that no shard holds: {some(absent)}"
    elsewhere = [name for name, file in index.items() if name in tensors and files[tensors[name].shard] != file]
    if elsewhere:
        name = elsewhere[0]
        yield (
            f"{found.name} says of {some(elsewhere)} that they are in another shard than they are: {name} is in "
            f"{files[tensors[name].shard]}, not in {index[name]}"
        )
    unnamed = [name for name in tensors if name not in index]
    if unnamed:
        yield f"{found.name} does not name tensors of its shards, which are read: {some(unnamed)}"
