"""Weights that are quantized already: which stored tensors make one, and how, as headers and config tell.

    stored                                                                          makes
    X.weight (FP8, int8), X.weight_scale or X.weight_scale_inv                      X.weight
    X.weight (two e2m1 a byte), X.weight_scale, and X.weight_scale_2 of NVFP4       X.weight
    X.weight_packed, X.weight_scale, and X.weight_zero_point, X.weight_global_scale X.weight
    X_blocks, X_scales (gpt-oss)                                                    X, transposed

Headers decide: the dtypes of numbers and scales, and the shape of a grid of scales beside that of the numbers. What the
config declares has to agree with them; where they don't, or where one of several is missing, that is a problem by name.
A checkpoint that declares what octavo can't decode, or holds it, has no codings: see `quantized`.

No weight is read here, and no scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .declared import Declared, Way, read_declared
from .header import TensorInfo
from .packing import FP8, PACK, SCALES, Groups, Shape, cells_of, count, fits, guesses, words
from .quantized import is_shown

#: what a scale is called, beside a tensor N: N + this
_SUFFIXES = ("_scale_inv", "_scale", "_weight_scale")
#: or beside X.weight: X + this
_BESIDE = (".scale", ".qscale_weight", ".scale_weight")
#: a scale of the scales of a matrix, and whether it divides them
_GLOBAL = {"_scale_2": False, "_weight_scale_2": False, "_global_scale": True}
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
#: beside N or in its module: columns in another order, or scaled before they meet the weight
_UNDECODED = ("_g_idx", ".pre_quant_scale", "_pre_quant_scale")


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
    shape_info: TensorInfo | None = None  # integers that repeat the shape
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
    def zero_grid(self) -> tuple[int, ...]:
        """The shape of its zero points as they are stored: those of packed numbers are packed, along rows."""
        *lead, rows, cols = self.grid
        return (*lead, count(rows, self.decoding.pack), cols)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is computed from."""
        parts = (self.codes, self.scale, self.zero_point, self.global_scale)
        return tuple(info for info in parts if info is not None)

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


class _Parts(NamedTuple):
    """A stored tensor of numbers, and what stands beside it."""

    name: str  # of the weight that they make
    codes: TensorInfo
    scales: list[TensorInfo]
    zero_point: TensorInfo | None
    global_scales: list[tuple[TensorInfo, bool]]  # and whether it divides
    shape_info: TensorInfo | None

    @property
    def blocks(self) -> bool:
        """Return True if the numbers of a scale group are an axis of their own, as gpt-oss has them."""
        return self.codes.name.endswith("_blocks")

    def matrix(self, kind: str) -> Shape:
        """[..., out, in], if they are of this kind."""
        shape = self.codes.shape
        if self.blocks:
            return (*shape[:-2], shape[-2] * shape[-1] * PACK[kind])
        return (*shape[:-1], shape[-1] * PACK[kind])

    @property
    def held(self) -> str:
        codes, scale = self.codes, self.scales[0]
        return f"{scale.name} is {list(scale.shape)} beside {codes.name}, {codes.dtype_name} {list(codes.shape)}"


class _Problem(Exception):
    """What headers say can't be."""


class _Finder:
    """Goes through the tensors of a checkpoint once."""

    def __init__(self, tensors: Mapping[str, TensorInfo], declared: Declared) -> None:
        self._tensors, self._declared = tensors, declared
        self.consumed: dict[str, str] = {}
        self.wrong: set[str] = set()  # codes of which there is a problem
        self.problems: list[str] = []

    def codings(self) -> Iterator[Coding]:
        for info in self._tensors.values():
            if info.dtype_name in (*FP8, "I8", "U8", "I32") and len(info.shape) > 1 and not _is_scale(info.name):
                try:
                    coding = self._of(info)
                except _Problem as problem:
                    self.problems.append(str(problem))
                    self.wrong.add(info.name)
                else:
                    if coding is not None:
                        yield coding
        if self.consumed or self._declared:
            caches = (name for name in self._tensors if name.rpartition(".")[2] in _CACHES)
            self.consumed.update(dict.fromkeys(caches, "scale of a cache"))

    def look_at(self, left: Mapping[str, TensorInfo]) -> None:
        """Find what is left over of a checkpoint that is declared to be quantized, and should not be."""
        for name, info in left.items():
            packed = info.dtype_name in ("U8", "I32") and name.endswith(("_packed", "_blocks"))
            if (packed or info.dtype_name in FP8) and len(info.shape) > 1:
                self.problems.append(f"{name} is {info.dtype_name}, and has no scale beside it")
            elif _is_scale(name):
                weight = next(name[: -len(end)] for end in (*_SUFFIXES, *_GLOBAL, "_zero_point") if name.endswith(end))
                other = self._tensors.get(weight)
                held = f"{other.dtype_name}, which has none" if other is not None else "not there"
                self.problems.append(f"{name} is the scale of {weight}, which is {held}")
            elif name in self._declared.weights and len(info.shape) > 1:
                self.problems.append(f"{name} is {info.dtype_name}, and {self._declared.where} says it is quantized")

    def _of(self, codes: TensorInfo) -> Coding | None:
        """What is made of these numbers; None where they are none, or none that octavo decodes."""
        parts = self._parts(codes)
        if parts is None or not parts.scales:
            return None
        kinds = _kinds(parts, bool(self._declared))
        if not kinds:
            return None
        self._take(parts)
        if parts.scales[1:]:
            raise _Problem(f"{codes.name} has {len(parts.scales)} scales: {' and '.join(s.name for s in parts.scales)}")
        scale = parts.scales[0]
        if scale.dtype_name not in SCALES[kinds[0]]:
            allowed = ", ".join(SCALES[kinds[0]])
            raise _Problem(f"{scale.name} is {scale.dtype_name}, and scales of {codes.dtype_name} are {allowed}")
        if parts.blocks and len(codes.shape) != 4:
            raise _Problem(f"{codes.name} is {list(codes.shape)}, and should be [experts, rows, groups, bytes]")
        kind, groups, symmetric = self._groups(parts, kinds)
        by, divided = self._global_scale(parts, kind)
        shape = parts.matrix(kind)
        if parts.blocks:
            shape = (*shape[:-2], shape[-1], shape[-2])
        coding = Coding(
            parts.name,
            shape,
            Decoding(kind, *groups, divided),
            *(codes, scale, parts.zero_point, by, parts.shape_info),
            transposed=parts.blocks,
        )
        _check_zero_point(coding, symmetric)
        return coding

    def _parts(self, codes: TensorInfo) -> _Parts | None:
        name = codes.name
        stem = name.removesuffix("_packed").removesuffix("_blocks")
        module, _, leaf = stem.rpartition(".")
        if any(each in self._tensors for end in _UNDECODED for each in (stem + end, module + end)):
            return None
        scales = [*self._beside(stem, ("_scales",) if name.endswith("_blocks") else _SUFFIXES)]
        if leaf == "weight" and stem == name:
            scales += self._beside(module, _BESIDE)
        by = [(self._tensors[stem + end], divides) for end, divides in _GLOBAL.items() if stem + end in self._tensors]
        zero, shape_info = (self._tensors.get(stem + end) for end in ("_zero_point", "_shape"))
        return _Parts(stem, codes, scales, zero, by, shape_info)

    def _beside(self, stem: str, suffixes: Sequence[str]) -> Iterator[TensorInfo]:
        return (self._tensors[stem + suffix] for suffix in suffixes if stem + suffix in self._tensors)

    def _take(self, parts: _Parts) -> None:
        """Note what a weight is made of, and what stands beside it for its activations."""
        name = parts.name
        module, _, leaf = name.rpartition(".")
        if parts.codes.name != name:
            self.consumed[parts.codes.name] = f"numbers of {name}"
        others = (*parts.scales, *(info for info, _ in parts.global_scales))
        self.consumed.update((info.name, f"scale of {name}") for info in others)
        for info, what in ((parts.zero_point, "zero points"), (parts.shape_info, "shape")):
            if info is not None:
                self.consumed[info.name] = f"{what} of {name}"
        beside = [f"{name}_{end}" for end in _ACTIVATIONS]
        if leaf == "weight":
            beside += [f"{module}.{end}" if module else end for end in _BESIDE_WEIGHT]
        self.consumed.update((each, f"scale of activations of {name}") for each in beside if each in self._tensors)

    def _groups(self, parts: _Parts, kinds: Sequence[str]) -> tuple[str, Groups, bool | None]:
        """Kind of numbers, sides of a scale group, and whether it is declared that there are no zero points."""
        found = {kind: cells_of(parts.matrix(kind), parts.scales[0].shape) for kind in kinds}
        grids = {kind: cells for kind, cells in found.items() if cells is not None}
        if not grids:
            raise _Problem(f"{parts.held}: no grid of scales for it")
        if not self._declared:
            (kind, cells), *_ = grids.items()
            return kind, _guess(parts, parts.matrix(kind), cells), None
        ways = [
            way
            for way in self._declared.ways
            if way.kind in grids and fits(parts.matrix(way.kind), grids[way.kind], way.groups)
        ]
        if not ways:
            said = ", or ".join(dict.fromkeys(map(str, self._declared.ways)))
            raise _Problem(f"{parts.held}, and {self._declared.where} says {said}")
        way = _choose(parts, ways, grids)
        return way.kind, way.groups, way.symmetric

    @staticmethod
    def _global_scale(parts: _Parts, kind: str) -> tuple[TensorInfo | None, bool]:
        """The scale of scales, which those of e4m3 have and no others, and whether it divides them."""
        wanted = kind == "e2m1" and parts.scales[0].dtype_name == "F8_E4M3"
        if len(parts.global_scales) != wanted:
            found = " and ".join(info.name for info, _ in parts.global_scales) or "none"
            raise _Problem(
                f"{parts.codes.name} should have {'one' if wanted else 'no'} scale of its {parts.scales[0].dtype_name} "
                f"scales, and has {found}"
            )
        if not wanted:
            return None, False
        info, divides = parts.global_scales[0]
        lead = list(parts.codes.shape[:-2])
        if info.dtype_name not in ("F32", "BF16", "F16") or list(info.shape) not in (lead, [*lead, 1], [*lead, 1, 1]):
            raise _Problem(
                f"{info.name} is {info.dtype_name} {list(info.shape)}, and should be one F32 for each matrix"
            )
        return info, divides


def _is_scale(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.endswith(_LEAVES if leaf.startswith("weight_") else ("_proj_scale_inv", "_proj_scale"))


_LEAVES = (*_SUFFIXES, *_GLOBAL, "_zero_point")


def _kinds(parts: _Parts, declared: bool) -> tuple[str, ...]:
    """The kinds of numbers that a stored tensor may hold, by its dtype and that of its scales."""
    codes, scale = parts.codes, parts.scales[0]
    if codes.dtype_name in FP8:
        return ("float8",)
    if codes.dtype_name == "I32":  # how many bits they have, no header says
        return ("int4_in_int32", "int8_in_int32") if codes.name.endswith("_packed") and declared else ()
    if codes.dtype_name == "I8" and scale.dtype_name not in ("F8_E8M0", "U8"):
        return ("int8",)
    return ("e2m1",) if scale.dtype_name in SCALES["e2m1"] else ()


def _guess(parts: _Parts, matrix: Shape, cells: tuple[int, int]) -> Groups:
    """The only sizes of groups that make a grid as large as this."""
    rows, cols = (guesses(length, n) for length, n in zip(matrix[-2:], cells, strict=True))
    if len(rows) != 1 or len(cols) != 1:
        raise _Problem(f"{parts.held}: which of them share a scale can't be told, and no config says it")
    return rows[0], cols[0]


def _choose(parts: _Parts, ways: Sequence[Way], grids: Mapping[str, tuple[int, int]]) -> Way:
    """The way that is declared for a weight, among those which its headers allow."""

    def meaning(way: Way) -> tuple[str, Groups]:
        cells = grids[way.kind]
        return way.kind, (None if cells[0] == 1 else way.groups[0], None if cells[1] == 1 else way.groups[1])

    if len(ways) > 1:
        ways = [way for way in ways if way.names(parts.name)] or ways
    if len({meaning(way) for way in ways}) > 1:
        said = ", or ".join(dict.fromkeys(map(str, ways)))
        raise _Problem(f"{parts.held}: may be {said}, and what the config says of targets does not tell")
    return ways[0]


def _check_zero_point(coding: Coding, symmetric: bool | None) -> None:
    zero, name = coding.zero_point, coding.codes.name
    if zero is None:
        if symmetric is False:
            raise _Problem(f"{name} has no zero points beside it, and its config says that it is not symmetric")
        return
    packed = coding.decoding.kind in ("int4_in_int32", "int8_in_int32")
    if symmetric or not (packed or coding.decoding.kind == "int8"):
        raise _Problem(f"{zero.name}: zero points beside {name}, which has none by its kind or its config")
    dtype, shape = ("I32", coding.zero_grid) if packed else ("I8", coding.scale.shape)
    if zero.dtype_name != dtype or zero.shape != shape:
        raise _Problem(f"{zero.name} is {zero.dtype_name} {list(zero.shape)}, and should be {dtype} {list(shape)}")
