"""Sources that are quantized already, on an accelerator: it is sent what is stored, and decodes it.

By the arithmetic of `octavo.numerics.decoding`, and then by the `Press` of a CPU, a tile at a time: all are operations
of torch that give the same bytes on any device. Nothing waits for the device: scales that are none, and codes that are
no numbers, are noticed when all else is done, and then read by the host, which says what is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.codings import Decoding
from ..elements.pieces import Piece
from ..numerics.decoding import scale_cells
from ..numerics.lossless import unit_of
from ..numerics.schemes import E8M0, FP8, Stored
from ..planning.budget import Budget
from ..planning.bundles import Bundle, Coded, most_weights
from ..planning.chunks import Chunk
from ..planning.placement import Placement
from .coded import TOO_LARGE, Encoded
from .nonfinite import FiniteWatch
from .on_cpu import Press
from .placed import Placed
from .sinks import Destination
from .staged import Staged

#: what makes infinity of a scale that is too large
_TO_INFINITY = 2.0**128 / TOO_LARGE


class PressThere(Press):
    """Decodes, quantizes and places bundles whose codes have been copied, for one lane."""

    _compares = False  # there, decoding takes next to nothing

    def __init__(
        self, checkpoint: Checkpoint, budget: Budget, placed: Placed, watch: FiniteWatch[list[Bundle]]
    ) -> None:
        super().__init__(checkpoint, budget, placed)
        self._out_bytes = most_weights(budget.block_bytes)
        self._watch, self._bundles = watch, list[Bundle]()

    def place(self, bundle: Bundle, coded: Coded, staged: Staged) -> None:
        """Do what the plan says with a bundle."""
        chunk = bundle.chunks[0]._replace(piece=bundle.piece, cells=bundle.cells)
        self._bundles = [bundle]
        self._place(chunk, self._encoded(bundle.piece, coded, staged))

    def _encoded(self, piece: Piece, coded: Coded, staged: Staged) -> Encoded:
        coding, lay, by = coded.coding, coded.lay, None
        codes = staged.view(coding.codes.dtype, coded.codes(piece))
        codes = codes.unsqueeze(-1) if lay.axis is None else codes.movedim(lay.axis, -1)
        stored = staged.view(coding.scale.dtype, coded.scale.piece)
        self._look_at(stored, 1.0 if coding.global_scale is not None else _TO_INFINITY)
        if coding.global_scale is not None and coded.global_scale is not None:
            by = staged.view(coding.global_scale.dtype, coded.global_scale)
            self._look_at(by, 1.0)
        scale = scale_cells(stored, coding.decoding, by)
        if by is not None:
            self._watch.add((scale * _TO_INFINITY).flatten(), self._bundles)
        by_row = scale_of_rows(scale, coding.decoding, coded.scale.phase, codes.shape[-2])
        return Encoded(coding, lay, codes, by_row, None, piece.size, unit_of(coding.decoding, by))

    def _look_at(self, stored: Tensor, factor: float) -> None:
        """Have it noticed if one of these is no scale, as `numerics.decoding.bad_scale` says, or not finite times that.

        Where there is a global scale, either may be of any size: the product is looked at.
        """
        wide = (stored.view(E8M0) if stored.dtype == torch.uint8 else stored).float() * factor
        # not a number of what is negative, and infinite of 0, where that is no scale
        self._watch.add((wide.sqrt_() if stored.dtype == FP8 else wide.log2_()).abs_().flatten(), self._bundles)

    # -- what a CPU looks at at once ----------------------------------------------------------------------------------

    def _check(self, amax: Tensor, chunk: Chunk, x: Tensor | Encoded) -> None:
        self._watch.add(amax, self._bundles)

    def _check_half(self, wide: Tensor, values: Tensor, piece: Piece, placement: Placement) -> None:
        # what was not finite before is copied; the largest of the others becomes infinite if one does
        largest = torch.linalg.vector_norm(wide.nan_to_num_(0.0, 0.0, 0.0), math.inf)
        self._watch.add(largest.to(values.dtype).float(), self._bundles)

    def _check_codes(self, codes: Tensor, chunk: Chunk, x: Encoded) -> None:
        # without its sign, what is no number is the largest
        largest = torch.bitwise_and(codes.view(torch.int8), 0x7F).amax()
        self._watch.add(largest.view(codes.dtype).float(), self._bundles)

    # -- blocks, not chunks of a ring ---------------------------------------------------------------------------------

    def _fold(self, chunk: Chunk, amax: Tensor) -> None:
        self._placed.fold(chunk.placement, chunk.cells, amax)

    def _view(self, destination: Destination, piece: Piece) -> Stored | None:
        return destination.view(piece)


def scale_of_rows(scale: Tensor, decoding: Decoding, phase: int, rows: int) -> Tensor:
    """[..., row cells, column cells] -> [..., rows, column cells], the first row ``phase`` into its group."""
    group = decoding.group_rows
    if group == 1:
        return scale
    *lead, high, wide = scale.shape
    if group is None:
        return scale.expand(*lead, rows, wide)
    return scale.unsqueeze(-2).expand(*lead, high, group, wide).flatten(-3, -2).narrow(-2, phase, rows)
