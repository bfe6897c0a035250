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

from .companions import CACHES, Companions, companions, is_alone, of_weight
from .declared import Declared, Way, read_declared
from .header import TensorInfo
from .packing import EXPONENTS, FLOATS, FP8, PACK, SCALES, Groups, Shape, cells_of, count, fits, guesses, words
from .quantized import is_shown

#: dtypes of numbers that may stand for weights
_NUMBERS = frozenset((*FP8, "I8", "U8", "I32"))


@dataclass(frozen=True, slots=True)
class Decoding:
    """How stored numbers become weights; `octavo.numerics.decoding` has the arithmetic."""

    kind: str  # of numbers, one of `PACK`
    group_rows: int | None  # rows of a scale group; None: all
    group_cols: int | None  # columns of a scale group; None: all
    divided: bool = False  # by the global scale are the scales; else multiplied
    powers: bool = False  # of two are the scales, or are said to be

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
    if not by_name and not finder.problems and not declared:
        return Codings()
    known = {*by_name, *finder.wrong, *finder.consumed}
    left = {name: info for name, info in tensors.items() if name not in known}
    alone = finder.alone(left) if declared else frozenset()
    if is_shown({name: info for name, info in left.items() if name not in alone}):  # something else beside it
        return Codings()
    if declared:
        finder.look_at(left)
    problems += finder.problems
    return Codings(by_name, finder.consumed) if by_name else Codings()


class _Parts(NamedTuple):
    """Stored numbers of a weight, and what stands beside them."""

    name: str  # of the weight that they make
    codes: TensorInfo
    scale: TensorInfo
    zero_point: TensorInfo | None
    global_scale: TensorInfo | None
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
        codes, scale = self.codes, self.scale
        return f"{scale.name} is {list(scale.shape)} beside {codes.name}, {codes.dtype_name} {list(codes.shape)}"


class _Form(NamedTuple):
    """What the codings of weights that are alike have in common."""

    shape: Shape
    decoding: Decoding
    transposed: bool


class _Problem(Exception):
    """What headers say can't be."""


class _Finder:
    """Goes through the tensors of a checkpoint once."""

    def __init__(self, tensors: Mapping[str, TensorInfo], declared: Declared) -> None:
        self._tensors, self._declared = tensors, declared
        self._forms: dict[Any, _Form] = {}
        self.consumed: dict[str, str] = {}
        self.wrong: set[str] = set()  # codes of which there is a problem
        self.problems: list[str] = []

    def codings(self) -> Iterator[Coding]:
        numbers = [info for info in self._tensors.values() if info.dtype_name in _NUMBERS and len(info.shape) > 1]
        beside = self._names_by_module() if numbers else {}
        for info in numbers:
            module, dot, leaf = info.name.rpartition(".")
            found = companions(leaf, beside[module]) if of_weight(info.name) is None else None
            if found is not None:
                try:
                    coding = self._of(info, module + dot, found)
                except _Problem as problem:
                    self.problems.append(str(problem))
                    self.wrong.add(info.name)
                else:
                    if coding is not None:
                        yield coding
        if self.consumed or self._declared:
            caches = ((name, info) for name, info in self._tensors.items() if name.rpartition(".")[2] in CACHES)
            # one for each head only where scales of caches are declared: parameters of models are called so, too
            of_caches = (name for name, info in caches if info.numel == 1 or self._declared.of_caches)
            self.consumed.update(dict.fromkeys(of_caches, "scale of a cache"))

    def alone(self, left: Mapping[str, TensorInfo]) -> frozenset[str]:
        """Of what is left over, the numbers that lack their scale and are otherwise what octavo decodes."""
        numbers = [name.rpartition(".") for name, info in left.items() if self._are_numbers(info)]
        beside = self._names_by_module() if numbers else {}
        return frozenset(module + dot + leaf for module, dot, leaf in numbers if is_alone(leaf, beside[module]))

    def _are_numbers(self, info: TensorInfo) -> bool:
        """Return True for what can only be numbers that need a scale, by its dtype, its name, and what is declared."""
        packed = info.dtype_name in ("U8", "I32") and info.name.endswith(("_packed", "_blocks"))
        kind = {"I8": "int8", "U8": "e2m1"}.get(info.dtype_name) if info.name.endswith("weight") else None
        said = any(way.kind == kind for way in self._declared.ways)
        return (packed or said or info.dtype_name in FP8) and len(info.shape) > 1

    def look_at(self, left: Mapping[str, TensorInfo]) -> None:
        """Find what is left over of a checkpoint that is declared to be quantized, and should not be."""
        for name, info in left.items():
            if self._are_numbers(info):
                self.problems.append(f"{name} is {info.dtype_name}, and has no scale beside it")
            elif (
                name.endswith("_scales") and self._tensors.get(blocks := f"{name.removesuffix('scales')}blocks") is None
            ):
                if any(way.kind == "e2m1" for way in self._declared.ways):
                    self.problems.append(f"{name} is the scale of {blocks}, which is not there")
            elif (weight := of_weight(name)) and (name.rpartition(".")[2].startswith("weight_") or weight in left):
                other = self._tensors.get(weight)
                if other is None and f"{weight}_packed" in left:
                    continue  # whose numbers are named
                held = f"{other.dtype_name}, which has none" if other is not None else "not there"
                self.problems.append(f"{name} is the scale of {weight}, which is {held}")
            elif name in self._declared.weights and len(info.shape) > 1:
                self.problems.append(f"{name} is {info.dtype_name}, and {self._declared.where} says it is quantized")

    def _names_by_module(self) -> dict[str, frozenset[str]]:
        found: dict[str, list[str]] = {}
        for name in self._tensors:
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, []).append(leaf)
        return {module: frozenset(leaves) for module, leaves in found.items()}

    def _of(self, codes: TensorInfo, prefix: str, beside: Companions) -> Coding | None:
        """What is made of these numbers; None where they are none that octavo decodes."""
        scale, *others = (self._tensors[prefix + name] for name in beside.scales)
        by = [self._tensors[prefix + name] for name, _ in beside.global_scales]
        zero, shape = (self._tensors[prefix + n] if n else None for n in (beside.zero_point, beside.shape))
        parts = _Parts(prefix + beside.weight, codes, scale, zero, by[0] if by else None, shape)
        seen = [(info.dtype_name, info.shape) for info in (codes, scale, *by, zero) if info is not None]
        key = (beside, *seen)
        form = self._forms.get(key)
        if form is None:
            kinds = _kinds(parts, bool(self._declared))
            if not kinds:
                return None
            self._take(parts, prefix, beside)
            if others:
                names = " and ".join(info.name for info in (scale, *others))
                raise _Problem(f"{codes.name} has {len(beside.scales)} scales: {names}")
            form, always = self._form(parts, kinds, beside)
            if always:
                self._forms[key] = form
        else:
            self._take(parts, prefix, beside)
        return Coding(parts.name, form.shape, form.decoding, *parts[1:], transposed=form.transposed)

    def _take(self, parts: _Parts, prefix: str, beside: Companions) -> None:
        """Note what a weight is made of, and what stands beside it for its activations."""
        name = parts.name
        if parts.codes.name != name:
            self.consumed[parts.codes.name] = f"numbers of {name}"
        what = f"scale of {name}"
        for each in beside.scales:
            self.consumed[prefix + each] = what
        for each, _ in beside.global_scales:
            self.consumed[prefix + each] = what
        if parts.zero_point is not None:
            self.consumed[parts.zero_point.name] = f"zero points of {name}"
        if parts.shape_info is not None:
            self.consumed[parts.shape_info.name] = f"shape of {name}"
        for each in beside.activations:
            self.consumed[prefix + each] = f"scale of activations of {name}"

    def _form(self, parts: _Parts, kinds: Sequence[str], beside: Companions) -> tuple[_Form, bool]:
        """The form of a coding, and whether all that have these shapes have it, whatever their names."""
        codes, scale = parts.codes, parts.scale
        if scale.dtype_name not in SCALES[kinds[0]]:
            allowed = ", ".join(SCALES[kinds[0]])
            raise _Problem(f"{scale.name} is {scale.dtype_name}, and scales of {codes.dtype_name} are {allowed}")
        if parts.blocks and len(codes.shape) != 4:
            raise _Problem(f"{codes.name} is {list(codes.shape)}, and should be [experts, rows, groups, bytes]")
        ways = self._ways(parts, kinds)
        way = _choose(parts, ways)
        _check_global_scale(parts, way.kind, [name for name, _ in beside.global_scales])
        divided = any(divides for _, divides in beside.global_scales)
        powers = way.powers or scale.dtype_name in EXPONENTS
        decoding = Decoding(way.kind, *way.groups, divided, powers)
        shape = parts.matrix(way.kind)
        _check_zero_point(Coding(parts.name, shape, decoding, *parts[1:]), way.symmetric)
        if parts.blocks:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return _Form(shape, decoding, parts.blocks), len(ways) == 1

    def _ways(self, parts: _Parts, kinds: Sequence[str]) -> list[Way]:
        """The ways in which headers allow that these numbers are quantized."""
        found = {kind: cells_of(parts.matrix(kind), parts.scale.shape) for kind in kinds}
        grids = {kind: cells for kind, cells in found.items() if cells is not None}
        if not grids:
            raise _Problem(f"{parts.held}: no grid of scales for it")
        if not self._declared:
            return [Way(kind, _guess(parts, parts.matrix(kind), cells), None) for kind, cells in grids.items()]
        ways = [way for way in self._declared.ways if way.kind in grids]
        ways = [way for way in ways if fits(parts.matrix(way.kind), grids[way.kind], way.groups)]
        if not ways:
            said = ", or ".join(dict.fromkeys(map(str, self._declared.ways)))
            raise _Problem(f"{parts.held}, and {self._declared.where} says {said}")
        return ways


def _kinds(parts: _Parts, declared: bool) -> tuple[str, ...]:
    """The kinds of numbers that a stored tensor may hold, by its dtype and that of its scales."""
    codes, scale = parts.codes, parts.scale
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


def _choose(parts: _Parts, ways: Sequence[Way]) -> Way:
    """The way that is declared for a weight, among those which its headers allow."""

    def meaning(way: Way) -> tuple[str, Groups]:
        rows, cols = (
            None if group is None or group >= length else group
            for group, length in zip(way.groups, parts.matrix(way.kind)[-2:], strict=True)
        )
        return way.kind, (rows, cols)

    # as compressed-tensors does: by name, by pattern, by class
    ways = [way for way in ways if parts.name in way.weights] or ways
    if len({meaning(way) for way in ways}) > 1:
        matching = [way for way in ways if way.matches(parts.name)]
        ways = matching or [way for way in ways if way.of_classes] or ways
    if len({meaning(way) for way in ways}) > 1:
        said = ", or ".join(dict.fromkeys(map(str, ways)))
        raise _Problem(f"{parts.held}: may be {said}, and what the config says of targets does not tell")
    return ways[0]


def _check_global_scale(parts: _Parts, kind: str, names: Sequence[str]) -> None:
    """Raise unless there is a scale of scales where those are of e4m3, and none where they are not."""
    wanted = kind == "e2m1" and parts.scale.dtype_name == "F8_E4M3"
    if len(names) != wanted:
        raise _Problem(
            f"{parts.codes.name} should have {'one' if wanted else 'no'} scale of its {parts.scale.dtype_name} scales, "
            f"and has {' and '.join(names) or 'none'}"
        )
    info, lead = parts.global_scale, list(parts.codes.shape[:-2])
    if info is None or (info.dtype_name in FLOATS and list(info.shape) in (lead, [*lead, 1], [*lead, 1, 1])):
        return
    raise _Problem(f"{info.name} is {info.dtype_name} {list(info.shape)}, and should be one F32 for each matrix")


def _check_zero_point(coding: Coding, symmetric: bool | None) -> None:
    """Raise unless there are zero points where that is declared, and none where it is not."""
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
