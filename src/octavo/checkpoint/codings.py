"""Weights that are quantized already: which stored tensors make one, and how, as headers and config tell.

    stored                                                      makes
    X.weight (FP8), X.weight_scale_inv or X.weight_scale, ...   X.weight

Headers decide: the dtypes of numbers and scales, and the shape of a grid of scales beside that of the numbers. What the
config declares has to agree with them; where they don't, or where one of several is missing, that is a problem by name.
A checkpoint that declares what octavo can't decode, or holds it, has no codings: see `quantized`.

No weight is read here, and no scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .declared import Declared, Way, read_declared
from .header import TensorInfo
from .packing import FP8, PACK, Groups, count, words
from .quantized import is_shown

#: what makes a float32 that is a scale; bytes are e8m0
_SCALES = {
    "float8": ("F32", "BF16", "F16", "F8_E8M0", "U8"),
    "int8": ("F32", "BF16", "F16"),
}
#: what a scale is called, beside a tensor N: N + this
_SUFFIXES = ("_scale_inv", "_scale", "_weight_scale")
#: or beside X.weight: X + this
_BESIDE = (".scale", ".qscale_weight", ".scale_weight")
#: scales of activations, beside N or in its module, which nobody needs who has weights in another format
_ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "input_global_scale",
    "input_zero_point",
    "output_scale",
    "act_scale",
)
_BESIDE_WEIGHT = (*_ACTIVATIONS, "qscale_act", "scale_input", "scale_activation")
#: scales of caches and of attention, in any module
_CACHES = frozenset(
    ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "k_zero_point", "v_zero_point", "q_zero_point")
)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How stored numbers become weights; `octavo.numerics.decoding` has the arithmetic."""

    kind: str  # of numbers, one of `PACK`
    group_rows: int | None  # rows of a scale group; None: all
    group_cols: int | None  # columns of a scale group; None: all
    divided: bool = False  # by the global scale are the scales; else multiplied

    @property
    def pack(self) -> int:
        """Weights, along a row, in one element of the codes."""
        return PACK[self.kind]

    def __str__(self) -> str:
        return words(self.kind, (self.group_rows, self.group_cols))


@dataclass(frozen=True, slots=True)
class Coding:
    """One weight, and the stored tensors that make it.

    All of these are seen as contiguous [..., out, in], whatever their shapes in the file.
    """

    name: str  # that of the weight
    shape: tuple[int, ...]  # that of the weight
    decoding: Decoding
    codes: TensorInfo
    scale: TensorInfo
    zero_point: TensorInfo | None = None
    global_scale: TensorInfo | None = None
    transposed: bool = False  # the weight is [..., in, out]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of the weight as it is stored, [..., out, in]."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """[..., out, elements of the codes]."""
        *lead, cols = self.matrix
        return (*lead, count(cols, self.decoding.pack))

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of its scales, [..., row cells, column cells]."""
        *lead, rows, cols = self.matrix
        return (*lead, count(rows, self.decoding.group_rows), count(cols, self.decoding.group_cols))

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All tensors that it is made of."""
        return tuple(info for info in (self.codes, self.scale, self.zero_point, self.global_scale) if info is not None)

    def __str__(self) -> str:
        return str(self.decoding)


@dataclass(frozen=True)
class Codings:
    """The weights of a checkpoint that are quantized, and what is none of its tensors therefore."""

    by_name: Mapping[str, Coding] = field(default_factory=dict)
    consumed: Mapping[str, str] = field(default_factory=dict)  # stored tensor -> what it is: "scale of X.weight"


def find_codings(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], problems: list[str]
) -> Codings:
    """All that is quantized in a checkpoint; nothing where any of it can't be decoded.

    Problems are appended: contradictions between what is declared and what headers show.
    """
    declared = read_declared(folder, config, problems)
    if declared.unknown is not None:
        return Codings()
    finder = _Finder(tensors, declared)
    by_name = {coding.name: coding for coding in finder.codings()}
    if not by_name and not finder.problems:
        return Codings()
    known = {*by_name, *finder.wrong, *finder.consumed}
    left = {name: info for name, info in tensors.items() if name not in known}
    if is_shown(left):  # something else beside it
        return Codings()
    if declared:
        finder.look_at(left)
    problems += finder.problems
    return Codings(by_name, finder.consumed)


class _Finder:
    """Goes through the tensors of a checkpoint once."""

    def __init__(self, tensors: Mapping[str, TensorInfo], declared: Declared) -> None:
        self._tensors, self._declared = tensors, declared
        self.consumed: dict[str, str] = {}
        self.wrong: set[str] = set()  # codes of which there is a problem
        self.problems: list[str] = []

    def codings(self) -> Iterator[Coding]:
        for info in self._tensors.values():
            if len(info.shape) > 1 and info.dtype_name in (*FP8, "I8") and not self._is_scale(info.name):
                known = len(self.problems)
                coding = self._of(info)
                if coding is not None:
                    yield coding
                elif self.problems[known:]:
                    self.wrong.add(info.name)
        if self.consumed or self._declared:
            caches = (name for name in self._tensors if name.rpartition(".")[2] in _CACHES)
            self.consumed.update(dict.fromkeys(caches, "scale of a cache"))

    def look_at(self, left: Mapping[str, TensorInfo]) -> None:
        """Find what is left over of a checkpoint that is declared to be quantized, and should not be."""
        for name, info in left.items():
            if info.dtype_name in FP8 and len(info.shape) > 1:
                self.problems.append(f"{name} is {info.dtype_name}, and has no scale beside it")
            elif self._is_scale(name):
                weight = next(name[: -len(end)] for end in _SUFFIXES if name.endswith(end))
                other = self._tensors.get(weight)
                held = f"{other.dtype_name}, which has none" if other is not None else "not there"
                self.problems.append(f"{name} is the scale of {weight}, which is {held}")
            elif name in self._declared.weights and len(info.shape) > 1:
                self.problems.append(f"{name} is {info.dtype_name}, and {self._declared.where} says it is quantized")

    @staticmethod
    def _is_scale(name: str) -> bool:
        return name.endswith((".weight_scale_inv", ".weight_scale", "_proj_scale_inv", "_proj_scale"))

    def _of(self, codes: TensorInfo) -> Coding | None:
        """What is made of these numbers; None, and perhaps a problem, where nothing is."""
        name = codes.name
        scales = [*self._beside(name, _SUFFIXES)]
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            scales += self._beside(module, _BESIDE)
        if not scales:
            return None
        if scales[1:]:
            self._take(codes, scales)
            self.problems.append(f"{name} has {len(scales)} scales: {' and '.join(s.name for s in scales)}")
            return None
        scale = scales[0]
        kind = "float8" if codes.dtype_name in FP8 else "int8"
        zero = self._tensors.get(f"{name}_zero_point") if kind == "int8" else None
        self._take(codes, [scale] if zero is None else [scale, zero])
        if scale.dtype_name not in _SCALES[kind]:
            self.problems.append(
                f"{scale.name} is {scale.dtype_name}, and scales of {codes.dtype_name} are {', '.join(_SCALES[kind])}"
            )
            return None
        groups = self._groups(kind, codes.shape, codes, scale)
        if groups is None:
            return None
        if zero is not None and (zero.shape != scale.shape or zero.dtype_name != "I8"):
            self.problems.append(
                f"{zero.name} is {zero.dtype_name} {list(zero.shape)}, and should be I8 {list(scale.shape)}"
            )
            return None
        return Coding(name, codes.shape, Decoding(kind, *groups), codes, scale, zero)

    def _beside(self, stem: str, suffixes: Sequence[str]) -> Iterator[TensorInfo]:
        return (self._tensors[stem + suffix] for suffix in suffixes if stem + suffix in self._tensors)

    def _take(self, codes: TensorInfo, parts: Sequence[TensorInfo]) -> None:
        """Note what a weight is made of, and what stands beside it for its activations."""
        name = codes.name
        module, _, leaf = name.rpartition(".")
        self.consumed.update((part.name, f"scale of {name}") for part in parts)
        beside = [f"{name}_{end}" for end in _ACTIVATIONS]
        if leaf == "weight":
            beside += [f"{module}.{end}" if module else end for end in _BESIDE_WEIGHT]
        self.consumed.update((each, f"scale of activations of {name}") for each in beside if each in self._tensors)

    # -- groups -------------------------------------------------------------------------------------------------------

    def _groups(self, kind: str, matrix: tuple[int, ...], codes: TensorInfo, scale: TensorInfo) -> Groups | None:
        """Rows and columns of a scale group; None, and a problem, where the headers leave no possibility, or two."""
        held = f"{scale.name} is {list(scale.shape)} beside {codes.name}, {codes.dtype_name} {list(codes.shape)}"
        cells = _cells(matrix, scale.shape)
        if cells is None:
            self.problems.append(f"{held}: no grid of scales for it")
            return None
        if not self._declared:
            return self._guessed(held, matrix, cells)
        ways = [way for way in self._declared.ways if way.kind == kind and _fits(matrix, cells, way.groups)]
        if ways:
            return self._chosen(ways, codes.name).groups
        said = ", or ".join(dict.fromkeys(map(str, self._declared.ways)))
        self.problems.append(f"{held}, and {self._declared.where} says {said}")
        return None

    def _chosen(self, ways: Sequence[Way], name: str) -> Way:
        """The way that is declared for a tensor by its name, among those which its headers allow."""
        return next((way for way in ways if name in way.weights), ways[0])

    def _guessed(self, held: str, matrix: tuple[int, ...], cells: tuple[int, int]) -> Groups | None:
        rows, cols = (_guesses(length, n) for length, n in zip(matrix[-2:], cells, strict=True))
        if len(rows) == len(cols) == 1:
            return rows[0], cols[0]
        self.problems.append(f"{held}: which of them share a scale can't be told, and no config says it")
        return None


def _cells(matrix: Sequence[int], shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of the grid that scales of this shape are; None if they are none for this matrix or stack."""
    *lead, rows, _ = matrix
    if len(shape) == len(matrix) + 2 and shape[-1] == shape[-3] == 1:  # ModelOpt: [row cells, 1, column cells, 1]
        shape = (*shape[:-4], shape[-4], shape[-2])
    if len(shape) == len(matrix) and list(shape[:-2]) == lead:
        return shape[-2], shape[-1]
    if list(shape) == lead or list(shape) == [*lead, 1]:
        return 1, 1
    return (rows, 1) if list(shape) == [*lead, rows] else None


def _fits(matrix: Sequence[int], cells: tuple[int, int], groups: Groups) -> bool:
    return (count(matrix[-2], groups[0]), count(matrix[-1], groups[1])) == cells


def _guesses(length: int, cells: int) -> list[int | None]:
    """Sizes of groups that cut so many elements into so many cells: the usual ones, and those that leave no rest."""
    if cells == 1:
        return [None]
    usual = [group for group in (16, 32, 64, 128) if count(length, group) == cells]
    even = [length // cells] if cells and length % cells == 0 and length else []
    return list(dict.fromkeys([*even, *usual]))
