"""Weights that are not finite: noticed on an accelerator without waiting for it, and said in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, contiguous_strides, whole
from ..planning.placement import Placement
from .coded import read_encoded
from .files import Files

#: how many magnitudes are in one allocation
_PAGE = 4096
What = TypeVar("What")


class FiniteWatch(Generic[What]):
    """Keeps the largest magnitude of some values each, on the device, and which these are.

    It is not finite if one of the values was not. Only asking waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._worst: list[Tensor] = []
        self._watched: list[What] = []
        self._asked = 0

    def add(self, amax: Tensor, what: What) -> None:
        """Watch values by the amax of their groups."""
        torch.amax(amax.view(-1), 0, out=self.cell(what))

    def cell(self, what: What) -> Tensor:
        """Where something not finite is to be written if one of some values is: a float32 that is 0."""
        at = len(self._watched) % _PAGE
        if not at:
            with torch.inference_mode(False):  # else later magnitudes could be written in this mode alone
                self._worst.append(torch.zeros(_PAGE, dtype=torch.float32, device=self._device))
        self._watched.append(what)
        return self._worst[-1][at]

    def suspects(self) -> list[What]:
        """All of which something was not finite, since this was asked before."""
        first, self._asked = self._asked, len(self._watched)
        if first == self._asked:
            return []
        page, at = divmod(first, _PAGE)
        finite = torch.isfinite(torch.cat(self._worst[page:]))[at : at + self._asked - first]
        return [self._watched[first + number] for number in torch.nonzero(~finite).flatten().tolist()]


def unfit(values: Tensor, placement: Placement) -> Tensor:
    """Which of the values their placement can't have: what is not finite, where it is quantized.

    Where it is not, that is copied as it is, and those are unfit that only become infinite in its dtype: fp16 holds no
    more than 65504.
    """
    if placement.scheme is not None:
        return ~torch.isfinite(values)
    return torch.isfinite(values) & torch.isinf(values.to(placement.dtype))


def unfit_text(checkpoint: Checkpoint, piece: Piece, values: Tensor, placement: Placement) -> str:
    """The first `unfit` number among the values of a piece, its place in the checkpoint, and what to do about it."""
    position = torch.nonzero(unfit(values, placement))[0].tolist()
    info = checkpoint.tensors[piece.src_name]
    flat = piece.src_off + sum(at * stride for at, stride in zip(position, piece.src_strides, strict=True))
    shape = info.shape if info.coding is None else info.coding.matrix
    where = [flat // stride % n for n, stride in zip(shape, contiguous_strides(shape), strict=True)]
    of = "" if placement.name == info.name else f", part of {placement.name}"
    if placement.scheme is None:
        wrong = (
            f"{dtypes.short(placement.dtype)} holds no number that large. Choose another dtype, as dtype='bfloat16'."
        )
    else:
        wrong = (
            "a non-finite weight can't be quantized. Repair the checkpoint, or keep it with "
            f"ignore={list(placement.ignored_as or (placement.name,))}."
        )
    return (
        f"{checkpoint.shard_of(info.name).path.name}: tensor {info.name!r} holds {values[tuple(position)].item()} "
        f"(at {where}){of}: {wrong}"
    )


def describe_nonfinite(checkpoint: Checkpoint, pieces: Iterable[tuple[Placement, Piece]]) -> str:
    """`unfit_text` for pieces of which only the amax has been seen: reads them again.

    Raises:
        WeightError: it is a scale that is none.
    """
    looked_at: dict[str, None] = {}
    with contextlib.closing(Files.of(checkpoint)) as files:
        for placement, piece in pieces:
            looked_at[piece.src_name] = None
            info = checkpoint.tensors[piece.src_name]
            values = files.read_values(info, piece) if info.coding is None else _decoded(files, info, piece)
            if bool(unfit(values, placement).any()):
                return unfit_text(checkpoint, piece, values, placement)
    first, *others = looked_at
    more = f" and {len(others):,} more" if others else ""
    return (
        f"{checkpoint.path}: the device saw a number that is not finite in tensor {first!r}{more}, but read again, all "
        "are. Either the file has changed meanwhile, or what the device computes is wrong. If that stays so, load "
        "on the CPU."
    )


def _decoded(files: Files, info: TensorInfo, piece: Piece) -> Tensor:
    """What codes stand for, float32."""
    most = 8 * (piece.numel + 1)  # of one number in a word of eight at worst
    found, _ = read_encoded(files, info, piece, torch.empty(most, dtype=torch.uint8, device="cpu"))
    return found.decode(whole("", found.shape), torch.empty(found.numel, dtype=torch.float32, device="cpu"))
