"""Where the tensors of a checkpoint go in a model: what a load leaves behind for updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.codings import Decoding
from ..elements.pieces import Piece
from .plan import Plan


@dataclass(frozen=True)
class Routes:
    """Where the tensors of a checkpoint go in the model that was loaded from it."""

    pieces: Mapping[str, tuple[tuple[str, Piece], ...]]  # checkpoint tensor -> (parameter as stored, piece)
    shapes: Mapping[str, tuple[int, ...]]
    unused: Mapping[str, str]  # checkpoint tensors that the load passed over -> why
    decodings: Mapping[str, Decoding]  # of those that were quantized already

    @classmethod
    def of(cls, plan: Plan, checkpoint: Checkpoint) -> Routes:
        pieces: dict[str, list[tuple[str, Piece]]] = {}
        for placement in plan.placements:
            for piece in placement.pieces:
                pieces.setdefault(piece.src_name, []).append((placement.name, piece))
        shapes = {name: checkpoint.tensors[name].shape for name in pieces}
        codings = {name: checkpoint.tensors[name].coding for name in pieces}
        decodings = {name: coding.decoding for name, coding in codings.items() if coding is not None}
        return cls({name: tuple(found) for name, found in pieces.items()}, shapes, dict(plan.unused), decodings)
