"""One parameter of a plan: where it goes, what it becomes, which pieces make it, and which rows share no scale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..checkpoint import dtypes
from ..checkpoint.codings import Coding
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece
from ..machine import on_cpu
from ..numerics import schemes
from ..numerics.scale_grid import ScaleGrid
from ..numerics.schemes import Scheme
from .coded import decoded_there, keeps_all, memory_of, passes, stored_nbytes, stored_piece
from .partition import Partition, partition_of, stored_cells
from .recipe import Decision


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter to fill (or a tensor to write), before anything is decided about it.

    The last two axes of ``shape`` and ``pieces`` are [out, in], or [in, out] if ``transposed``: when quantized, it is
    then stored the other way round, so that scale groups always run along the last axis. A matrix of the rows of many
    matrices is then stored as these, ``apart``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # when it stays unquantized; None: the source's, byte for byte
    kind: str
    pieces: tuple[Piece, ...]
    device: str = "cpu"
    keep: str | None = None  # what it is, if it stays by default and its name does not tell
    transposed: bool = False
    apart: tuple[tuple[int, ...], tuple[Piece, ...]] | None = None  # shape and pieces


@dataclass(frozen=True, slots=True)
class Placement:
    """One parameter: its scheme or the reason for none, and the pieces that tile it.

    Where only some ``columns`` have a place here, ``shape``, ``pieces`` and ``grid`` are of all that is read; what is
    stored has ``stored_shape`` and ``scale_shape``.
    """

    name: str
    shape: tuple[int, ...]
    dtype_name: str  # as safetensors writes it; when quantized, that of the scheme
    source_dtype_names: tuple[str, ...]
    scheme: str | None
    reason: str
    pieces: tuple[Piece, ...]
    parts: tuple[int, ...]  # runs of rows that never share a scale group; () when unquantized
    device: str
    source_bytes: int
    ignored_as: tuple[str, ...] = ()  # patterns by which a recipe would leave it; default: its own name
    columns: tuple[int, int] | None = None  # [start, stop) that have a place here; None: all
    codings: tuple[tuple[str, Coding], ...] = ()  # of sources that are quantized already
    lossless: bool = False  # scales are those under which most of these stay what they are
    passed: bool = field(init=False, repr=False, compare=False)  # codes and scales of all sources stay what they are

    def __post_init__(self) -> None:
        # decided here, for each chunk asks for it; what replaces pieces makes a placement anew
        passed = self.scheme is not None and bool(self.codings)
        passed = passed and passes(self.pieces, self.parts, self.shape[-1], self.rule, dict(self.codings))
        object.__setattr__(self, "passed", passed)

    @property
    def by_host(self) -> bool:
        """Return True if the host makes its bytes: it stays there, or can't be decoded elsewhere."""
        if on_cpu(self.device):
            return True
        return bool(self.codings) and not decoded_there(self.pieces, dict(self.codings))

    @property
    def stored_bytes(self) -> int:
        """Bytes that its sources take in the files, scales aside; `source_bytes` are those of the weights."""
        if not self.codings:
            return self.source_bytes
        codings, itemsize = dict(self.codings), self.itemsize
        return sum(stored_nbytes(piece, codings.get(piece.src_name), itemsize) for piece in self.pieces)

    @property
    def sources(self) -> tuple[str, ...]:
        """What its sources are: dtypes as safetensors names them, and codings in words."""
        return tuple(dict.fromkeys(str(coding) for _, coding in self.codings)) or self.source_dtype_names

    @property
    def itemsize(self) -> int:
        """Bytes of an element of its sources at most."""
        return max((dtypes.moved_bits(name) for name in self.source_dtype_names), default=8) // 8

    @property
    def read_itemsize(self) -> int:
        """Bytes of memory that reading an element takes at most, with its share of scales."""
        return max([self.itemsize, *{memory_of(coding) for _, coding in self.codings}])

    @property
    def dtype(self) -> torch.dtype:
        return dtypes.MOVED[self.dtype_name]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what has a place here."""
        return self.shape if self.columns is None else (*self.shape[:-1], self.columns[1] - self.columns[0])

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The shape of the memory, of its dtype, that holds it."""
        return self.rule.stored_shape(self.stored_shape) if self.scheme else self.stored_shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.memory_shape) * dtypes.moved_bits(self.dtype_name) // 8

    def bytes_of(self, elements: int) -> int:
        """Bytes that some of its elements take."""
        return elements * self.nbytes // max(1, math.prod(self.stored_shape))

    @property
    def rule(self) -> Scheme:
        """Its scheme; only a quantized placement has one."""
        assert self.scheme is not None
        return schemes.get(self.scheme)

    @property
    def grid(self) -> ScaleGrid:
        """The scale grid of all that is read; only a quantized placement has one."""
        return ScaleGrid(self.shape, self.rule, self.parts)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape in which its scale is stored."""
        return self._stored(self.grid.stored_shape)

    @property
    def scale_grid(self) -> tuple[int, ...]:
        """The stored scale's shape with its [row cells, column cells] always spelled out."""
        return self._stored(self.grid.grid_shape)

    def _stored(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The cells of the columns that have a place here."""
        if self.columns is None or not grid:
            return grid
        return (*grid[:-1], stored_cells(self.columns, self.rule.group_cols)[1])

    @property
    def scale_bytes(self) -> int:
        if self.scheme is None:
            return 0
        return math.prod(self.scale_shape) * self.rule.scale_dtype.itemsize

    @property
    def final_bytes(self) -> int:
        return self.nbytes + self.scale_bytes

    def partition(
        self, piece: Piece, cells: tuple[slice, ...] = (), phase: tuple[int, int] = (0, 0)
    ) -> Partition | None:
        """What of a box has a place here, given the cells of its scales; None where nothing has."""
        if self.columns is None:
            return Partition(piece, cells, phase)
        group = None if self.scheme is None else self.rule.group_cols
        return partition_of(piece, cells, phase, self.columns, group)

    def elements(self, piece: Piece) -> int:
        """How many elements of a box have a place here."""
        if self.columns is None:
            return piece.numel
        mine = self.partition(piece)
        return 0 if mine is None else mine.piece.numel


def placement_of(target: Target, decision: Decision, infos: Mapping[str, TensorInfo]) -> Placement:
    sources = dict.fromkeys(piece.src_name for piece in target.pieces)
    names = tuple(dict.fromkeys(infos[name].dtype_name for name in sources))
    if decision.scheme:
        dtype_name = dtypes.NAMES[schemes.get(decision.scheme).dtype]
    elif target.dtype is None:
        dtype_name = names[0]
    else:
        dtype_name = dtypes.NAMES[target.dtype]
    shape, pieces = target.apart if decision.scheme and target.apart else (target.shape, target.pieces)
    if decision.scheme and target.transposed:
        swapped = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
        shape, pieces = tuple(shape[d] for d in swapped), tuple(piece.permute(swapped) for piece in pieces)
    if any(infos[name].coding for name in sources):
        pieces = tuple(_as_stored(piece, infos[piece.src_name].coding) for piece in pieces)
    pieces = tuple(sorted(pieces, key=lambda p: (infos[p.src_name].shard, infos[p.src_name].offset, p.src_off)))
    parts = cut_parts(shape, pieces) if decision.scheme else ()
    codings = tuple((name, coding) for name in sources if (coding := infos[name].coding) is not None)
    placement = Placement(
        target.name,
        shape,
        dtype_name,
        names,
        decision.scheme,
        decision.reason,
        pieces,
        parts,
        target.device,
        sum(piece.numel * dtypes.moved_bits(infos[piece.src_name].dtype_name) // 8 for piece in pieces),
        codings=codings,
    )
    if placement.scheme is None or not codings:
        return placement
    if placement.passed:
        return replace(placement, reason=f"{placement.reason}, passed through")
    lossless = keeps_all(pieces, placement.parts, shape[-1], placement.rule, dict(codings))
    if not lossless:
        return placement
    return replace(placement, lossless=True, reason=f"{placement.reason}, exact wherever FP8 has the number")


def _as_stored(piece: Piece, coding: Coding | None) -> Piece:
    """A piece that counts within what is stored, in the order of the file."""
    found = piece if coding is None or not piece.numel else stored_piece(piece, coding)
    assert found is not None, f"{piece.src_name}: see lay_problems"
    return found


def cut_parts(shape: Sequence[int], pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Cut the rows where one checkpoint tensor ends and another begins, across the whole width and all experts.

    So each checkpoint tensor of a fused parameter (gate and up) is quantized as if alone.
    """
    rows = shape[-2]
    if len({piece.src_name for piece in pieces}) == 1:
        return (rows,)
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    joined: dict[int, int] = {}  # a row -> no cut is between it and this one: a piece or a tensor goes on
    for piece in pieces:
        name, row = piece.src_name, piece.dst_off[-2]
        first[name], last[name] = min(first.get(name, row), row), max(last.get(name, row), row)
        joined[row] = max(joined.get(row, 0), piece.dst_end[-2])
    for name, row in first.items():
        joined[row] = max(joined[row], last[name] + 1)
    bounds, end = [0], joined.get(0, 0)
    for row in sorted({*joined, rows} - {0}):
        if row == rows or row >= end:
            bounds.append(row)
        end = max(end, joined.get(row, 0))
    return tuple(b - a for a, b in itertools.pairwise(bounds))
