"""Weights of an update that come in FP8 or int8: numbers and scales, whichever is first, make one weight.

A trainer that computes in these has ``X.weight`` in one of them, and beside it ``X.weight_scale_inv`` or
``X.weight_scale``. What they stand for is `octavo.numerics.decoding`, as for a checkpoint.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.codings import Coding, Decoding
from ..checkpoint.companions import of_weight
from ..checkpoint.header import TensorInfo
from ..checkpoint.packing import EXPONENTS, SCALES, Groups, are_codes, cells_of, fits, guesses
from ..elements.operations import offset_of
from ..elements.pieces import Piece
from ..errors import CoverageError, raise_problems
from ..numerics import schemes
from ..numerics.decoding import bad_scale, decode, holds_nan, scale_cells
from ..planning.coded import lay_of, passes
from ..text import human_bytes
from .quantize.storage import QuantizedStorage

_SUFFIXES, _ZERO_POINT = ("_scale_inv", "_scale"), "_zero_point"
#: the blocks of a matrix, where its sides don't tell
_USUAL = (128, 128)
TAKEN = "an update takes bf16, fp16 or fp32, and quantizes it itself; FP8 and int8 with scales that come as"


class Came(NamedTuple):
    """A tensor of an update, and where it is quantized, its scales and what they are called."""

    name: str
    tensor: Tensor
    scale: Tensor | None = None
    scale_name: str = ""


class Waiting:
    """Numbers whose scales have not come yet, and scales without their numbers.

    Args:
        limit_bytes: of copies of them; a single tensor may be larger.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._numbers: dict[str, Tensor] = {}
        self._scales: dict[str, tuple[str, Tensor]] = {}
        self._came: dict[str, str] = {}  # names of weights -> what to say of a scale that is left over
        self._copied: dict[str, int] = {}  # names of copies -> bytes
        self._copied_bytes = 0

    @property
    def names(self) -> list[str]:
        return [*self._numbers, *(name for name, _ in self._scales.values())]

    def joined(
        self,
        pairs: Iterable[tuple[str, Tensor]],
        own: Container[str],
        whole: Callable[[str, Tensor], bool],
        check: Callable[[str, Tensor], None],
        keep: Callable[[], bool],
    ) -> Iterator[Came]:
        """All pairs, numbers in FP8 and int8 together with their scales; what comes alone waits.

        Args:
            own: names that are no scales, whatever they look like.
            whole: tells of numbers that have no scales.
            check: raises where a tensor can't be read.
            keep: tells whether tensors have to be copied that wait for others.

        Raises:
            CoverageError: two tensors are the same part of a weight, or too many wait.
        """
        numbers, scales = self._numbers, self._scales
        for name, tensor in pairs:
            check(name, tensor)
            weight = None if name in own else of_weight(name)
            if weight is not None and name.removeprefix(weight) in _SUFFIXES:
                if weight in scales:
                    raise CoverageError(f"{weight} has two scales: {scales[weight][0]} and {name}")
                scales[weight] = name, self._held(name, tensor, keep() and weight not in numbers)
                name = weight
            elif weight is not None and name == weight + _ZERO_POINT:
                raise CoverageError(
                    f"{name}: an update takes no zero points. Let {weight} come in bf16, fp16 or fp32, or in numbers "
                    "that have none"
                )
            elif are_codes(dtypes.NAMES.get(tensor.dtype, ""), tensor.ndim) and not whole(name, tensor):
                if name in numbers:
                    raise CoverageError(f"{name} came twice before its scales")
                numbers[name] = self._held(name, tensor, keep() and name not in scales)
            else:
                self._came[name] = f"is no scale of {name}, which came as {dtypes.short(tensor.dtype)}. Drop it"
                yield Came(name, tensor)
                continue
            if name in numbers and name in scales:
                scale_name, scale = scales.pop(name)
                for each in (name, scale_name):
                    self._copied_bytes -= self._copied.pop(each, 0)
                self._came[name] = f"is a second scale of {name}, which came with {scale_name}. Drop one of them"
                yield Came(name, numbers.pop(name), scale, scale_name)

    def keep(self) -> None:
        """Hold nothing any more that is its owner's."""
        for name, tensor in self._numbers.items():
            self._numbers[name] = self._held(name, tensor, name not in self._copied)
        for weight, (name, tensor) in self._scales.items():
            self._scales[weight] = name, self._held(name, tensor, name not in self._copied)

    def check(self) -> None:
        """Raise for what came alone."""
        problems = [
            f"{name} is {dtypes.short(tensor.dtype)}, and its scales did not come; {TAKEN} {name}_scale_inv or "
            f"{name}_scale"
            for name, tensor in self._numbers.items()
        ]
        problems += [
            f"{name} {self._came.get(weight, f'came without {weight} in FP8 or int8, of which it is the scale')}"
            for weight, (name, _) in self._scales.items()
        ]
        raise_problems(CoverageError, "update", problems)

    def _held(self, name: str, tensor: Tensor, copy: bool) -> Tensor:
        if not copy:
            return tensor
        after = self._copied_bytes + tensor.nbytes
        if self._copied and after > self.limit_bytes:
            raise CoverageError(
                f"{len(self._copied) + 1:,} tensors wait for their scales, or are scales that wait for their "
                f"numbers, {human_bytes(after)}, more than staging_bytes "
                f"({human_bytes(self.limit_bytes)}): {next(iter(self._copied))}, ..., {name}. Let scales follow their "
                "numbers, or raise staging_bytes"
            )
        self._copied[name], self._copied_bytes = tensor.nbytes, after
        return tensor.clone()


@dataclass(frozen=True)
class Coded:
    """A weight in FP8 or int8, with its scales as a grid [..., row cells, column cells]."""

    coding: Coding
    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, came: Came, likely: Iterable[Groups]) -> Coded:
        """Numbers and scales that came, in the first of likely groups that fits them, or in what their shapes tell.

        Raises:
            CoverageError: they don't fit together, or the shapes tell no groups; or a scale is none.
        """
        assert came.scale is not None
        shape, held = tuple(came.tensor.shape), dtypes.NAMES.get(came.scale.dtype, "")
        kind = "float8" if came.tensor.dtype.is_floating_point else "int8"
        cells = cells_of(shape, tuple(came.scale.shape))
        if cells is None or held not in SCALES[kind]:
            found = f"{dtypes.short(came.scale.dtype)} {list(came.scale.shape)}"
            raise CoverageError(f"{came.scale_name} is {found}, which are no scales of {came.name} {list(shape)}")
        scale = came.scale.reshape(*shape[:-2], *cells)
        if (bad := bad_scale(scale)) is not None:
            raise CoverageError(f"{came.scale_name}: {bad}")
        told = itertools.product(guesses(shape[-2], cells[0]), guesses(shape[-1], cells[1]))
        groups = [group for group in (*likely, _USUAL) if fits(shape, cells, group)][:1] or list(told)
        if len(groups) != 1:
            raise CoverageError(
                f"{came.scale_name} is {list(came.scale.shape)}, by which nobody can tell what rows and columns of "
                f"{came.name} {list(shape)} share a scale. Let it come in bf16, or with a scale for each row or each "
                "block of 128x128"
            )
        codes = TensorInfo(came.name, dtypes.NAMES[came.tensor.dtype], shape, 0, 0, 0)
        info = TensorInfo(came.scale_name, held, tuple(scale.shape), 0, 0, 0)
        coding = Coding(came.name, shape, Decoding(kind, *groups[0], powers=held in EXPONENTS), codes, info)
        return cls(coding, came.tensor.contiguous(), scale.to(came.tensor.device))

    def decode(self) -> Tensor:
        """What they stand for, float32."""
        return decode(self.coding.shape, self.codes, self.scale, self.coding.decoding)

    @functools.cached_property
    def _is_finite(self) -> bool:
        info: Any = torch.iinfo(torch.int8)
        if self.codes.dtype.is_floating_point:
            info = torch.finfo(self.codes.dtype)
            if holds_nan(self.codes):
                return False
        most = scale_cells(self.scale, self.coding.decoding).amax() * max(info.max, -info.min)
        return bool(torch.isfinite(most)) or bool(torch.isfinite(self.decode()).all())

    def numbers(self, piece: Piece) -> Tensor:
        """The numbers of a piece, whose offset counts from the first."""
        return self.codes.as_strided(piece.size, piece.src_strides, offset_of(self.codes) + piece.src_off)

    def passed(self, piece: Piece, storage: QuantizedStorage) -> Tensor | None:
        """The scales of a piece where a storage holds just such numbers and scales; None where it does not."""
        scheme, cols = storage.scheme, storage.weight.shape[-1]
        parts = storage.parts or (storage.weight.shape[-2],)
        if len(self.coding.shape) > 2 or not passes([piece], parts, cols, scheme, {piece.src_name: self.coding}):
            return None
        if not storage.holds_groups(piece.box) or not self._is_finite:
            return None  # to be quantized, which says what is wrong
        lay = lay_of(piece, self.coding.matrix)
        assert lay is not None
        row, col = (
            at // (group or 1 << 62) for at, group in ((lay.row, scheme.group_rows), (lay.col, scheme.group_cols))
        )
        place = storage.scale_place(piece.box)
        cells = self.scale[row : row + place.shape[-2], col : col + place.shape[-1]]
        return schemes.to_stored(scale_cells(cells, self.coding.decoding), scheme).reshape(place.shape)
