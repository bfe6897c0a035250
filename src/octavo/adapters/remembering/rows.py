"""Placements as rows of JSON, and back: for the same checkpoint.

Tensors of the checkpoint are written as their numbers; shapes, reasons and whatever else thousands of placements have
in common are written once. What is read back is not trusted: each piece has to lie in its tensor, and all pieces of a
parameter have to tile it. Whatever does not is a ValueError, or what Python raises of such things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.codings import Coding
from ...elements.boxes import coverage_problem
from ...elements.pieces import Piece
from ...numerics import schemes
from ...planning.placement import Placement
from .checked import natural, naturals, require, text, texts

Json = Any
Row = list[Any]


class _Kind(NamedTuple):
    """What many placements have in common; the fields are those of `Placement`."""

    shape: tuple[int, ...]
    dtype_name: str
    source_dtype_names: tuple[str, ...]
    scheme: str | None
    reason: str
    parts: tuple[int, ...]
    source_bytes: int
    ignored_as: tuple[str, ...]
    columns: tuple[int, int] | None
    lossless: bool

    @classmethod
    def of(cls, placement: Placement) -> _Kind:
        return cls(*(getattr(placement, name) for name in cls._fields))

    @classmethod
    def read(cls, row: Sequence[Json]) -> _Kind:
        shape, dtype_name, source_dtype_names, scheme, reason, parts, source_bytes, ignored_as, columns, lossless = row
        kind = cls(
            naturals(shape),
            text(dtype_name),
            texts(source_dtype_names),
            None if scheme is None else schemes.get(text(scheme)).name,
            text(reason),
            naturals(parts),
            natural(source_bytes),
            texts(ignored_as),
            None if columns is None else (natural(columns[0]), natural(columns[1])),
            lossless is True,
        )
        kind._check()
        return kind

    def _check(self) -> None:
        require(self, {self.dtype_name, *self.source_dtype_names} <= dtypes.BITS.keys())
        require(self, self.columns is None or self.columns[0] < self.columns[1] <= self.shape[-1])
        if self.scheme is None:
            require(self, not self.parts)
        else:
            dtype = schemes.get(self.scheme).dtype
            require(self, dtypes.TORCH[self.dtype_name] == dtype and sum(self.parts) == self.shape[-2])


class _Cut(NamedTuple):
    """A piece, wherever in its tensor it begins."""

    dst_off: tuple[int, ...]
    size: tuple[int, ...]
    src_strides: tuple[int, ...]

    @classmethod
    def read(cls, row: Sequence[Json]) -> _Cut:
        cut = cls(*map(naturals, row))
        require(row, len(cut.dst_off) == len(cut.size) == len(cut.src_strides))
        return cut


class Numbers:
    """Numbers of values, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._found: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        return self._found.setdefault(value, len(self._found))

    def rows(self) -> list[Any]:
        return [*self._found]


@dataclass(frozen=True)
class Writing:
    """Rows that are written, and what they have in common.

    Args:
        numbers: of the names that are known to whoever reads them; tensors of the checkpoint are the first.
        device: that all placements have.
    """

    checkpoint: Checkpoint
    numbers: Mapping[str, int]
    device: str
    _kinds: Numbers = field(default_factory=Numbers)
    _cuts: Numbers = field(default_factory=Numbers)

    def row(self, placement: Placement) -> Row:
        """Raise a ValueError where there is something that this form has no place for."""
        require(placement, placement.device == self.device)
        pieces = [
            number
            for dst_off, size, src_name, src_off, src_strides in placement.pieces
            for number in (self._cuts.of((dst_off, size, src_strides)), self.numbers[src_name], src_off)
        ]
        coded = [name for name, _ in placement.codings]
        require(placement, placement.codings == tuple((n, self.checkpoint.tensors[n].coding) for n in coded))
        return [
            self._kinds.of(_Kind.of(placement)),
            self.numbers.get(placement.name, placement.name),
            [self.numbers[name] for name in coded],
            *pieces,
        ]

    def common(self) -> dict[str, Json]:
        """What the rows have in common; to be asked for when all are written."""
        return {"kinds": self._kinds.rows(), "cuts": self._cuts.rows()}


class Reading:
    """Thousands of rows are read; what they have in common is checked and computed once.

    Args:
        names: as their numbers were given; tensors of the checkpoint are the first.
        device: that all placements get.
        common: see `Writing.common`.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str], device: str, common: Mapping[str, Json]) -> None:
        self._infos = [(info, info.numel) for info in checkpoint.tensors.values()]
        self._names, self._device = names, device
        self._kinds = [_Kind.read(row) for row in common["kinds"]]
        cuts = map(_Cut.read, common["cuts"])
        self._cuts = [(cut, reach(cut.size, cut.src_strides)) for cut in cuts]  # with how far they reach
        self._tiled: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()  # shapes, by cuts

    def placement(self, row: Row) -> Placement:
        """Raise whatever comes of a row that is not as it was written."""
        number, name, coded, *flat = row
        kind, tensors = self._kinds[number], self._infos
        shape, known, pieces = kind.shape, kind.source_dtype_names, []
        for which, source, offset in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            (info, held), (cut, far) = tensors[source], self._cuts[which]
            if not 0 <= offset <= held - far or info.dtype_name not in known:
                raise ValueError("a piece outside of its tensor")
            pieces.append(Piece(cut.dst_off, cut.size, info.name, offset, cut.src_strides))
        if (tiling := (shape, tuple(flat[::3]))) not in self._tiled:
            if problem := coverage_problem(shape, pieces):
                raise ValueError(problem)
            self._tiled.add(tiling)
        return Placement(
            name if isinstance(name, str) else self._names[name],
            shape,
            kind.dtype_name,
            known,
            kind.scheme,
            kind.reason,
            tuple(pieces),
            kind.parts,
            self._device,
            kind.source_bytes,
            kind.ignored_as,
            kind.columns,
            self._codings(coded) if coded else (),
            kind.lossless,
        )

    def _codings(self, coded: Row) -> tuple[tuple[str, Coding], ...]:
        infos = [self._infos[source][0] for source in coded]
        require(infos, all(info.coding for info in infos))
        return tuple((info.name, info.coding) for info in infos if info.coding)


def reach(size: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of memory from the first of a view to beyond its last."""
    return 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True)) if math.prod(size) else 0
