"""Shapes that no header tells: of packed numbers that don't fill the last word of a row.

compressed-tensors keeps the shape of such a weight in a tensor of its own: some bytes, which are read. They have to
agree with the words that hold the numbers, and with the groups of columns that share a scale.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from .codings import Coding, Codings
from .declared import Contradiction
from .files import open_regular
from .header import Shard, TensorInfo
from .packing import count

#: of a shape: no weight has more axes
_MAX_BYTES = 64


def with_shapes(found: Codings, shards: Sequence[Shard], problems: list[Contradiction]) -> Codings:
    """The codings with the shapes that are stored; problems are appended where these can't be those of the numbers.

    Raises:
        SourceChangedError: a shard is not the file that was opened.
        OSError: one can't be read.
    """
    by_name = dict(found.by_name)
    for number, codings in _open_by_shard(found.by_name).items():
        with open_regular(shards[number].path) as file:
            shards[number].check_is(os.fstat(file.fileno()))
            for coding, raw in _read(codings, file.fileno()):
                by_name[coding.name] = _settled(coding, raw, problems)
    return replace(found, by_name=by_name)


def shape_in(info: TensorInfo, shards: Sequence[Shard]) -> tuple[int, ...]:
    """The shape that a tensor holds; none where it holds something else. Errors: see `with_shapes`."""
    if info.nbytes > _MAX_BYTES:
        return ()
    with open_regular(shards[info.shard].path) as file:
        shards[info.shard].check_is(os.fstat(file.fileno()))
        return tuple(_integers(os.pread(file.fileno(), info.nbytes, info.offset), info.dtype_name))


def _open_by_shard(codings: Mapping[str, Coding]) -> dict[int, list[Coding]]:
    """Shard -> the codings whose shape stands in it, in the order of the file."""
    found: dict[int, list[tuple[int, Coding]]] = {}
    for coding in codings.values():
        info, decoding = coding.shape_info, coding.decoding
        if info is not None and decoding.pack > 1:
            found.setdefault(info.shard, []).append((info.offset, coding))
    return {shard: [coding for _, coding in sorted(many, key=lambda one: one[0])] for shard, many in found.items()}


def _read(codings: Sequence[Coding], descriptor: int) -> Iterator[tuple[Coding, bytes]]:
    """Codings with the bytes of their shapes, or none where these are too many; in the order of the file.

    There may be tens of thousands. Writers put tensors of one dtype one after another, and such are read at once.
    """
    run: list[tuple[Coding, int]] = []
    start = end = 0
    for coding in codings:
        info = coding.shape_info
        assert info is not None
        nbytes = info.nbytes if info.nbytes <= 8 * len(coding.shape) else 0
        if info.offset != end:
            yield from _cut(run, os.pread(descriptor, end - start, start))
            run, start = [], info.offset
        run.append((coding, nbytes))
        end = info.offset + nbytes
    yield from _cut(run, os.pread(descriptor, end - start, start))


def _cut(run: Sequence[tuple[Coding, int]], raw: bytes) -> Iterator[tuple[Coding, bytes]]:
    at = 0
    for coding, nbytes in run:
        yield coding, raw[at : at + nbytes]
        at += nbytes


def _settled(coding: Coding, raw: bytes, problems: list[Contradiction]) -> Coding:
    info = coding.shape_info
    assert info is not None
    shape = tuple(_integers(raw, info.dtype_name))
    *lead, cols = shape or (0,)
    words = coding.codes.shape[-1]
    group, cells = coding.decoding.group_cols, coding.grid[-1]
    if tuple(lead) == coding.shape[:-1] and count(cols, coding.decoding.pack) == words and cols > 0:
        if count(cols, group) == cells:
            return coding if shape == coding.shape else replace(coding, shape=shape)
        told = f"{info.name} says {list(shape)}, and {coding.scale.name} holds {cells} groups of {group} columns"
        problems.append(Contradiction(told, info.name))
        return coding
    if not coding.codes.numel:
        return coding
    codes, pack = coding.codes, coding.decoding.pack
    told = f"{info.name} says {list(shape)}, and {codes.name} holds {list(codes.shape)} words of {pack}"
    problems.append(Contradiction(told, info.name))
    return coding


def _integers(raw: bytes, dtype_name: str) -> Iterator[int]:
    code = {"I32": "i", "I64": "q"}.get(dtype_name)
    if code is not None and len(raw) % struct.calcsize(code) == 0:
        yield from struct.unpack(f"<{len(raw) // struct.calcsize(code)}{code}", raw)
