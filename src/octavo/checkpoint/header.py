"""One shard's header: what it declares, and whether that can be true.

Checked here: the header's length, JSON without duplicate keys, known dtypes, byte counts that match shapes, offsets
without gaps or overlaps, a file that ends where the header says.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, SourceChangedError, reason
from ..text import shown
from . import dtypes
from .files import Identity, conforms, open_regular, parse_json

if TYPE_CHECKING:
    from .codings import Coding

#: the limit of the reference implementation (safetensors' MAX_HEADER_SIZE)
MAX_HEADER_BYTES = 100_000_000
#: far beyond what any model has, and such that nothing that follows takes long or much memory: of a tensor's name, in
#: characters; of its axes; of its bytes; and of the bytes of all tensors of a checkpoint, and their number
MAX_TENSORS = 500_000
MAX_NAME, MAX_AXES, MAX_TENSOR_BYTES, MAX_BYTES = 1024, 64, 1 << 42, 1 << 46
#: what other readers, and torch, hold sides and counts in
_MAX_COUNT = (1 << 63) - 1
#: of an entry
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: where its bytes are, and what they mean.

    One with a ``coding`` is made of several that are stored: dtype and shape are those of the weights that they stand
    for, and its bytes those of the codes.
    """

    name: str
    dtype_name: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    shard: int  # index into Checkpoint.shards
    offset: int  # absolute, in bytes from the start of the file
    nbytes: int
    coding: Coding | None = None

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
    identity: Identity
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.identity.nbytes

    def check_unchanged(self) -> None:
        """Raise if the file is not the one that was opened."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise SourceChangedError(f"{self.path}: can't be read any more: {reason(error)}") from error
        self.check_is(found)

    def check_is(self, found: os.stat_result) -> None:
        """Raise unless this is the file whose header was read, unchanged. Ask it of a descriptor that is read from."""
        if Identity.of(found) != self.identity:
            raise SourceChangedError(
                f"{self.path}: changed since it was opened ({self.nbytes:,} bytes then, {found.st_size:,} now). "
                "Run again when nothing writes to the checkpoint."
            )


def read_shard(path: Path, number: int, problems: list[str]) -> tuple[Shard | None, list[TensorInfo]]:
    """Read and validate one header; problems are appended, never raised, so that all files are heard."""
    try:
        with open_regular(path) as file:
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
        problems.append(f"{path.name}: can't be read: {reason(error)}")
        return None, []
    except CheckpointError as error:
        problems.append(f"{path.name}: {error}")
        return None, []
    shard = Shard(path, Identity.of(stat), metadata)
    base = 8 + header_bytes
    infos = []
    end = 0
    for name, entry in entries:
        try:
            if len(name) > MAX_NAME or not name.isascii():
                _check_name(name)
            dtype_name, shape, begin, stop = _parse_entry(entry)
            if not _is_usual(dtype_name, shape, begin, stop, end):
                _check_extent(dtype_name, shape, begin, stop, end)
        except CheckpointError as error:
            problems.append(f"{path.name}: tensor {shown(name)}: {error}")
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
        header = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"header: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not conforms(metadata, dict[str, str]):
        raise CheckpointError("header: __metadata__ must map strings to strings")
    if not all(map(_is_unicode, (*metadata, *metadata.values()))):
        raise CheckpointError("header: __metadata__ is no Unicode text (it holds half a surrogate pair)")
    return sorted(header.items(), key=lambda item: (_declared_begin(item[1]), _declared_end(item[1]))), metadata


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME:
        raise CheckpointError(f"its name is {len(name):,} characters long, and may be of at most {MAX_NAME:,}")
    if not _is_unicode(name):
        raise CheckpointError("its name is no Unicode text (it holds half a surrogate pair): no other reader opens it")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:  # one look at what thousands of entries are; of any other, what is odd is found out below
        dtype_name, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        usual = len(entry) == 3 and type(shape) is list and len(shape) <= MAX_AXES and dtype_name in dtypes.BITS
        if usual and type(begin) is type(stop) is int and 0 <= begin <= stop <= _MAX_COUNT:
            for side in shape:
                if type(side) is not int or not 0 < side <= _MAX_COUNT:
                    break
            else:
                return dtype_name, tuple(shape), begin, stop
    except (TypeError, KeyError, ValueError):
        pass
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise CheckpointError("an entry must have exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in dtypes.BITS:
        raise CheckpointError(f"unknown dtype {shown(dtype_name)}; known: {', '.join(dtypes.BITS)}")
    if isinstance(shape, list) and len(shape) > MAX_AXES:
        raise CheckpointError(f"its shape has {len(shape):,} axes, and may have at most {MAX_AXES}")
    if not isinstance(shape, list) or not all(map(_is_natural, shape)):
        raise CheckpointError(f"shape {shown(shape)} is not a list of non-negative integers of 63 bits")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        raise CheckpointError(f"data_offsets {shown(offsets)} are not two non-negative integers of 63 bits")
    return dtype_name, tuple(shape), offsets[0], offsets[1]


def _is_usual(dtype_name: str, shape: tuple[int, ...], begin: int, stop: int, previous_end: int) -> bool:
    """Return True for a tensor of whole bytes, none of whose sides is 0, that begins where the one before it ends."""
    nbytes = stop - begin
    return (
        begin == previous_end
        and 0 < nbytes <= MAX_TENSOR_BYTES
        and math.prod(shape) * dtypes.BITS[dtype_name] == nbytes * 8
    )


def _check_extent(dtype_name: str, shape: tuple[int, ...], begin: int, stop: int, previous_end: int) -> None:
    if stop < begin:
        raise CheckpointError(f"data_offsets end at {stop:,} before they begin at {begin:,}")
    # empty ones, too: torch computes strides of them
    if math.prod(n or 1 for n in shape) > _MAX_COUNT:
        raise CheckpointError(f"{dtype_name} {shown(list(shape))} takes more elements than 63 bits can count")
    bits = math.prod(shape) * dtypes.BITS[dtype_name]
    if bits % 8 or bits // 8 != stop - begin:
        raise CheckpointError(
            f"{dtype_name} {list(shape)} takes {bits / 8:,.10g} bytes, data_offsets give {stop - begin:,}"
        )
    if stop - begin > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{stop - begin:,} bytes large; octavo reads tensors of at most {MAX_TENSOR_BYTES:,}")
    if begin < previous_end:
        raise CheckpointError(f"overlaps the tensor before it: begins at {begin:,}, that one ends at {previous_end:,}")
    if begin > previous_end:
        raise CheckpointError(f"{begin - previous_end:,} bytes before it belong to no tensor (a gap)")


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


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
