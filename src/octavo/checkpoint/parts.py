"""Stored numbers of a weight and what stands beside them: of which kinds they may be, and whether they agree.

A contradiction raises `Problem`, whose text names tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .declared import Way
from .header import TensorInfo
from .packing import EXPONENTS, FLOATS, FP8, PACK, SCALES, Groups, Shape, count, guesses

#: what reads the shape that a tensor of a few integers holds
ShapeOf = Callable[[TensorInfo], Shape]


class Problem(Exception):
    """What headers say can't be."""


class Parts(NamedTuple):
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


def kinds_of(parts: Parts, declared: bool) -> tuple[str, ...]:
    """The kinds of numbers that a stored tensor may hold, by its dtype and that of its scales."""
    codes, scale = parts.codes, parts.scale
    if codes.dtype_name in FP8:
        return ("float8",)
    if codes.dtype_name == "I32":  # how many bits they have, no header says
        told = declared or parts.shape_info is not None
        return ("int4_in_int32", "int8_in_int32") if codes.name.endswith("_packed") and told else ()
    if codes.dtype_name == "I8" and scale.dtype_name not in ("F8_E8M0", "U8"):
        return ("int8",)
    return ("e2m1",) if scale.dtype_name in SCALES["e2m1"] else ()


def by_shape(parts: Parts, kinds: Sequence[str], shape_of: ShapeOf) -> list[str]:
    """The kinds of packed numbers of which a row that is as long as the stored shape says takes so many words."""
    if parts.shape_info is None:
        return []
    *_, cols = shape_of(parts.shape_info) or (0,)
    words = parts.codes.shape[-1]
    # of very few numbers a row, other widths may take as many words
    bits = [each for each in range(1, 9) if count(cols * each, 32) == words]
    return [kind for kind in kinds if bits == [32 // PACK[kind]]]


def guess(parts: Parts, matrix: Shape, cells: tuple[int, int]) -> Groups:
    """The only sizes of groups that make a grid as large as this."""
    rows, cols = (guesses(length, n) for length, n in zip(matrix[-2:], cells, strict=True))
    if len(rows) != 1 or len(cols) != 1:
        raise Problem(f"{parts.held}: which of them share a scale can't be told, and no config says it")
    group = min(matrix[-1], cols[0] or matrix[-1])
    if parts.scale.dtype_name in EXPONENTS and parts.codes.dtype_name in ("I8", "U8") and group != min(matrix[-1], 32):
        # MXFP4 has 32; bytes that are integers, or of another format, would be taken for it
        raise Problem(f"{parts.held}: as FP4 they would be in groups of {group}, and no config says so")
    return rows[0], cols[0]


def choose(parts: Parts, ways: Sequence[Way], shape_of: ShapeOf) -> Way:
    """The way that is declared for a weight, among those which its headers allow; or the shape tells that it has."""

    def meaning(way: Way, zeros: bool = True) -> tuple[str, Groups, bool | None]:
        rows, cols = (
            None if group is None or group >= length else group
            for group, length in zip(way.groups, parts.matrix(way.kind)[-2:], strict=True)
        )
        return way.kind, (rows, cols), way.symmetric if zeros else None

    # as compressed-tensors does: by name, by pattern, by class
    ways = [way for way in ways if parts.name in way.weights] or ways
    if len({meaning(way) for way in ways}) > 1:
        matching = [way for way in ways if way.matches(parts.name)]
        ways = matching or [way for way in ways if way.of_classes] or ways
    if len({way.kind for way in ways}) > 1:
        told = by_shape(parts, [way.kind for way in ways], shape_of)
        ways = [way for way in ways if way.kind in told] or ways
    if len({meaning(way) for way in ways}) > 1:  # one of them has zero points, and another none
        ways = [way for way in ways if way.symmetric in (None, parts.zero_point is None)] or ways
    if len({meaning(way, zeros=False) for way in ways}) > 1:
        said = ", or ".join(dict.fromkeys(map(str, ways)))
        raise Problem(f"{parts.held}: may be {said}, and what the config says of targets does not tell")
    return ways[0]


def check_global_scale(parts: Parts, way: Way, named: Sequence[tuple[str, bool]], where: str) -> None:
    """Raise unless there is a scale of scales where those are of e4m3, and none where they are not.

    Args:
        named: what is called as such a scale is, and whether it divides by that name.
        where: the way is declared; empty if nothing is.
    """
    wanted = way.kind == "e2m1" and parts.scale.dtype_name == "F8_E4M3"
    if len(named) != wanted:
        raise Problem(
            f"{parts.codes.name} should have {'one' if wanted else 'no'} scale of its {parts.scale.dtype_name} scales, "
            f"and has {' and '.join(name for name, _ in named) or 'none'}"
        )
    info, lead = parts.global_scale, list(parts.codes.shape[:-2])
    if info is None:
        return
    if info.dtype_name not in FLOATS or list(info.shape) not in (lead, [*lead, 1], [*lead, 1, 1]):
        raise Problem(f"{info.name} is {info.dtype_name} {list(info.shape)}, and should be one F32 for each matrix")
    (_, divided), expected = named[0], way.divided
    if expected is None and not divided and parts.codes.name.endswith("_packed"):
        expected, where = True, f"{parts.codes.name} beside it"
    if expected is not None and divided != expected:
        does = {True: "divides, as compressed-tensors has it", False: "multiplies, as ModelOpt has it"}
        raise Problem(f"{info.name} by its name {does[divided]}, and by {where} it {does[expected]}")
