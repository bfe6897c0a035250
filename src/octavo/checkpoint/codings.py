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

from .companions import CACHES, Companions, companions, is_alone, of_weight, undecoded
from .declared import Contradiction, Declared, Way, read_declared
from .header import TensorInfo
from .packing import EXPONENTS, FP8, PACK, SCALES, Shape, cells_of, count, fits, words
from .parts import Parts, Problem, ShapeOf, by_shape, check_global_scale, choose, guess, kinds_of
from .quantized import shown

#: dtypes of numbers that may stand for weights
_NUMBERS = frozenset((*FP8, "I8", "U8", "I32"))
#: what is left out of a checkpoint as decoded, and belongs to no weight
OF_CACHE = "scale of a cache"


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
        return f"{self.decoding}{'' if self.zero_point is None else ' and zero points'}"


@dataclass(frozen=True)
class Codings:
    """The weights of a checkpoint that are quantized, and what is none of its tensors therefore."""

    by_name: Mapping[str, Coding] = field(default_factory=dict)
    consumed: Mapping[str, str] = field(default_factory=dict)  # stored tensor -> what it is: "scale of X.weight"
    refused: str | None = field(default=None, compare=False)  # what can't be decoded, for which nothing is


def find_codings(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    problems: list[Contradiction],
    shape_of: ShapeOf = lambda _: (),
) -> Codings:
    """All that is quantized in a checkpoint; nothing where any of it can't be decoded.

    Problems are appended: contradictions between what is declared and what headers show. ``shape_of`` is asked where
    neither tells how many bits packed numbers have.
    """
    declared = read_declared(folder, config, problems)
    if declared.unknown is not None:
        return Codings(refused=declared.unknown)
    finder = _Finder(tensors, declared, shape_of)
    by_name = {coding.name: coding for coding in finder.codings()}
    if not by_name and not finder.problems and not declared:
        return Codings(refused=finder.undecoded)
    known = {*by_name, *finder.wrong, *finder.consumed}
    left = {name: info for name, info in tensors.items() if name not in known}
    alone = finder.alone(left) if declared else frozenset()
    others = shown({name: info for name, info in left.items() if name not in alone})
    if others is not None:
        return Codings(refused=finder.undecoded or others)
    if declared:
        finder.look_at(left)
    problems += finder.problems
    return Codings(by_name, finder.consumed) if by_name else Codings()


class _Form(NamedTuple):
    """What the codings of weights that are alike have in common."""

    shape: Shape
    decoding: Decoding
    transposed: bool


class _Finder:
    """Goes through the tensors of a checkpoint once."""

    def __init__(self, tensors: Mapping[str, TensorInfo], declared: Declared, shape_of: ShapeOf) -> None:
        self._tensors, self._declared, self._shape_of = tensors, declared, shape_of
        self._forms: dict[Any, _Form] = {}
        self.consumed: dict[str, str] = {}
        self.wrong: set[str] = set()  # codes of which there is a problem
        self.problems: list[Contradiction] = []
        self.undecoded: str | None = None  # the first tensor that keeps numbers beside it from being decoded

    def codings(self) -> Iterator[Coding]:
        numbers = [info for info in self._tensors.values() if info.dtype_name in _NUMBERS and len(info.shape) > 1]
        beside = self._names_by_module() if numbers else {}
        for info in numbers:
            module, dot, leaf = info.name.rpartition(".")
            found = companions(leaf, beside[module]) if of_weight(info.name) is None else None
            if found is None and self.undecoded is None and (name := undecoded(leaf, beside[module])) is not None:
                self.undecoded = module + dot + name
            if found is not None:
                try:
                    coding = self._of(info, module + dot, found)
                except Problem as problem:
                    self.problems.append(Contradiction(str(problem), info.name))
                    self.wrong.add(info.name)
                else:
                    if coding is not None:
                        yield coding
        if self.consumed or self._declared:
            caches = ((name, info) for name, info in self._tensors.items() if name.rpartition(".")[2] in CACHES)
            # one for each head only where scales of caches are declared: parameters of models are called so, too
            of_caches = (name for name, info in caches if info.numel == 1 or self._declared.of_caches)
            self.consumed.update(dict.fromkeys(of_caches, OF_CACHE))

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
        alone = info.dtype_name in FP8 and not self._declared.ignores(info.name)  # else it stands for what it holds
        return (packed or said or alone) and len(info.shape) > 1

    def look_at(self, left: Mapping[str, TensorInfo]) -> None:
        """Find what is left over of a checkpoint that is declared to be quantized, and should not be."""
        for name, info in left.items():
            if self._are_numbers(info):
                self.problems.append(Contradiction(f"{name} is {info.dtype_name}, and has no scale beside it", name))
            elif (
                name.endswith("_scales") and self._tensors.get(blocks := f"{name.removesuffix('scales')}blocks") is None
            ):
                if any(way.kind == "e2m1" for way in self._declared.ways):
                    self.problems.append(Contradiction(f"{name} is the scale of {blocks}, which is not there", name))
            elif (weight := of_weight(name)) and (name.rpartition(".")[2].startswith("weight_") or weight in left):
                other = self._tensors.get(weight)
                if other is None and f"{weight}_packed" in left:
                    continue  # whose numbers are named
                held = f"{other.dtype_name}, which has none" if other is not None else "not there"
                self.problems.append(Contradiction(f"{name} is the scale of {weight}, which is {held}", name))
            elif name in self._declared.weights and len(info.shape) > 1:
                self.problems.append(
                    Contradiction(f"{name} is {info.dtype_name}, and {self._declared.where} says it is quantized", name)
                )

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
        parts = Parts(prefix + beside.weight, codes, scale, zero, by[0] if by else None, shape)
        seen = [(info.dtype_name, info.shape) for info in (codes, scale, *by, zero) if info is not None]
        key = (beside, *seen)
        form = self._forms.get(key)
        if form is None:
            kinds = kinds_of(parts, bool(self._declared))
            if not kinds:
                return None
            self._take(parts, prefix, beside)
            if others:
                names = " and ".join(info.name for info in (scale, *others))
                raise Problem(f"{codes.name} has {len(beside.scales)} scales: {names}")
            form, always = self._form(parts, kinds, beside)
            if always:
                self._forms[key] = form
        else:
            self._take(parts, prefix, beside)
        return Coding(parts.name, form.shape, form.decoding, *parts[1:], transposed=form.transposed)

    def _take(self, parts: Parts, prefix: str, beside: Companions) -> None:
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

    def _form(self, parts: Parts, kinds: Sequence[str], beside: Companions) -> tuple[_Form, bool]:
        """The form of a coding, and whether all that have these shapes have it, whatever their names."""
        codes, scale = parts.codes, parts.scale
        if scale.dtype_name not in SCALES[kinds[0]]:
            allowed = ", ".join(SCALES[kinds[0]])
            raise Problem(f"{scale.name} is {scale.dtype_name}, and scales of {codes.dtype_name} are {allowed}")
        if parts.blocks and len(codes.shape) != 4:
            raise Problem(f"{codes.name} is {list(codes.shape)}, and should be [experts, rows, groups, bytes]")
        ways = self._ways(parts, kinds)
        way = choose(parts, ways, self._shape_of)
        check_global_scale(parts, way, beside.global_scales, self._declared.where)
        divided = any(divides for _, divides in beside.global_scales)
        powers = way.powers or scale.dtype_name in EXPONENTS
        decoding = Decoding(way.kind, *way.groups, divided, powers)
        shape = parts.matrix(way.kind)
        _check_zero_point(Coding(parts.name, shape, decoding, *parts[1:]), way.symmetric)
        if parts.blocks:
            shape = (*shape[:-2], shape[-1], shape[-2])
        # where no config tells one of several kinds, the shape that is stored beside each weight may have done so
        told = bool(self._declared) or len(kinds) == 1
        return _Form(shape, decoding, parts.blocks), told and len(ways) == 1

    def _ways(self, parts: Parts, kinds: Sequence[str]) -> list[Way]:
        """The ways in which headers allow that these numbers are quantized."""
        found = {kind: cells_of(parts.matrix(kind), parts.scale.shape) for kind in kinds}
        grids = {kind: cells for kind, cells in found.items() if cells is not None}
        if not grids:
            raise Problem(f"{parts.held}: no grid of scales for it")
        if not self._declared:
            told = list(grids) if len(grids) == 1 else by_shape(parts, [*grids], self._shape_of)
            if not told:
                raise Problem(f"{parts.held}: no config says how many bits these have, nor does a shape beside them")
            return [Way(kind, guess(parts, parts.matrix(kind), grids[kind]), None) for kind in told]
        ways = [way for way in self._declared.ways if way.kind in grids]
        ways = [way for way in ways if fits(parts.matrix(way.kind), grids[way.kind], way.groups)]
        if not ways:
            said = ", or ".join(dict.fromkeys(map(str, self._declared.ways))) or "of none how it is quantized"
            raise Problem(f"{parts.held}, and {self._declared.where} says {said}")
        return ways


def _check_zero_point(coding: Coding, symmetric: bool | None) -> None:
    """Raise unless there are zero points where that is declared, and none where it is not."""
    zero, name = coding.zero_point, coding.codes.name
    if zero is None:
        if symmetric is False:
            raise Problem(f"{name} has no zero points beside it, and its config says that it is not symmetric")
        return
    packed = coding.decoding.kind in ("int4_in_int32", "int8_in_int32")
    if symmetric or not (packed or coding.decoding.kind == "int8"):
        raise Problem(f"{zero.name}: zero points beside {name}, which has none by its kind or its config")
    dtype, shape = ("I32", coding.zero_grid) if packed else ("I8", coding.scale.shape)
    if zero.dtype_name != dtype or zero.shape != shape:
        raise Problem(f"{zero.name} is {zero.dtype_name} {list(zero.shape)}, and should be {dtype} {list(shape)}")
