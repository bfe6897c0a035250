"""Sources that are quantized already, on an accelerator: it is sent what is stored, and decodes it.

Where Triton compiles, by a kernel for each bundle. Else, and where there is no kernel for what is wanted, by the
arithmetic of `octavo.numerics.decoding`, and then by the `Press` of a CPU, a tile at a time: all are operations of
torch that give the same bytes on any device. Nothing waits for the device: scales that are none, and codes that are no
numbers, are noticed when all else is done, and then read by the host, which says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.codings import Coding, Decoding
from ..elements.pieces import Piece
from ..numerics import decoding, schemes
from ..numerics.decoding import Source, scale_cells
from ..numerics.groups import count_cells
from ..numerics.lossless import keeps, unit_of
from ..numerics.schemes import E8M0, FP8, Stored
from ..planning.budget import Budget
from ..planning.bundles import Bundle, Coded, most_weights
from ..planning.chunks import Chunk, Work
from ..planning.coded import coding_is
from ..planning.placement import Placement
from .coded import TOO_LARGE, Encoded
from .nonfinite import FiniteWatch
from .on_cpu import Press
from .placed import Placed
from .sinks import Destination
from .staged import Staged

#: dtypes in which a kernel writes what codes stand for
_WRITTEN = (torch.bfloat16, torch.float16, torch.float32)
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
        kernel = decoding.kernel(staged.bytes.device)
        if kernel is None or not self._by_kernel(kernel, chunk, coded, staged):
            self._place(chunk, self._encoded(bundle.piece, coded, staged))

    def _by_kernel(self, kernel: Any, chunk: Chunk, coded: Coded, staged: Staged) -> bool:
        """Do it in one launch or two; False, and nothing is done, where there is no kernel for it."""
        placement, work, axis, axes = chunk.placement, chunk.work, coded.lay.axis, len(chunk.piece.size)
        mine = placement.partition(chunk.piece, chunk.cells, chunk.phase)
        if axes not in (2, 3) or axis is None or axis < axes - 2 or mine is None:
            return False
        across = axis != axes - 1  # its columns are those of the source's rows
        known = kernel.takes(coded.coding.codes.dtype, coded.coding.decoding)
        if not known or work in (Work.AMAX, Work.REREAD) or (across and mine.columns is not None):
            return False
        destination = self._placed.destination(placement)
        if work is Work.COPY:
            values = destination.view(mine.piece)
            if not isinstance(values, Tensor) or values.dtype not in _WRITTEN:
                return False
            source = _source_of(chunk.piece, coded, staged)
            kernel.decode_into(values.mT if across else values, source, self._watch.cell(self._bundles), mine.columns)
            destination.written(mine.piece)
            return True
        scheme = placement.rule
        groups = scheme.groups[::-1] if across else scheme.groups
        if work is Work.QUANTIZE and not kernel.makes(scheme, groups, coded.global_scale is not None):
            return False
        source = _source_of(chunk.piece, coded, staged)
        seen = destination.view_scale(mine.cells) if mine.columns is None else None
        if seen is not None and (seen.dtype, seen.device) != (scheme.scale_dtype, staged.bytes.device):
            seen = None
        cells = [part.stop - part.start for part in chunk.cells]
        scales = torch.empty(cells, dtype=scheme.scale_dtype, device=staged.bytes.device) if seen is None else seen
        assert work is not Work.PASS or scales.shape == source.scale.shape

        def quantize(out: Stored) -> None:
            assert isinstance(out, Tensor)
            bad = self._watch.cell(self._bundles)
            if work is Work.PASS:
                kernel.copy_into(out, scales, source, bad, mine.columns)
            else:
                assert not any(chunk.phase), "whole scale groups"
                to = (out.mT, scales.mT) if across else (out, scales)
                kernel.quantize_into(*to, source, groups, bad, lossless=placement.lossless, window=mine.columns)
            if seen is None:
                destination.put_scale(mine.cells, mine.of_scales(scales))

        self._quantize_to(destination, mine.piece, scheme, quantize)
        return True

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


def _source_of(piece: Piece, coded: Coded, staged: Staged) -> Source:
    """What a kernel reads, with the axes of the source: rows, and then columns."""
    coding, lay = coded.coding, coded.lay
    how, codes = coding.decoding, staged.view(coding.codes.dtype, coded.codes(piece))
    scale, by = staged.view(coding.scale.dtype, coded.scale.piece), None
    if coding.global_scale is not None and coded.global_scale is not None:
        by = staged.view(coding.global_scale.dtype, coded.global_scale).float()
    phase = coded.scale.phase, 0 if how.group_cols is None else lay.col % how.group_cols
    in_rows = lay.axis == len(piece.size) - 1
    return Source(codes if in_rows else codes.mT, scale, by, how, phase, lay.col % how.pack, lay.cols)


def scale_of_rows(scale: Tensor, how: Decoding, phase: int, rows: int) -> Tensor:
    """[..., row cells, column cells] -> [..., rows, column cells], the first row ``phase`` into its group."""
    group = how.group_rows
    if group == 1:
        return scale
    *lead, high, wide = scale.shape
    if group is None:
        return scale.expand(*lead, rows, wide)
    return scale.unsqueeze(-2).expand(*lead, high, group, wide).flatten(-3, -2).narrow(-2, phase, rows)


def rehearse(device: torch.device, names: Iterable[str], codings: Iterable[Coding]) -> None:
    """Have the kernels compiled and loaded that take such sources to these schemes, where Triton compiles."""
    kinds = {(c.decoding, c.codes.dtype, c.scale.dtype, c.global_scale is None): c for c in codings}
    kernel = decoding.kernel(device) if kinds else None
    if kernel is None:
        return
    rows = cols = 256
    for coding in kinds.values():
        how = coding.decoding
        if not kernel.takes(coding.codes.dtype, how):
            continue
        grid = count_cells(rows, how.group_rows), count_cells(cols, how.group_cols)
        codes = torch.zeros((rows, cols // how.pack), dtype=coding.codes.dtype, device=device)
        scale = torch.full(grid, 127, dtype=torch.uint8, device=device).to(coding.scale.dtype)
        bad, by = torch.zeros(2, dtype=torch.float32, device=device)
        globally = None if coding.global_scale is None else by
        source = Source(codes, scale, globally, how, (0, 0), 0, cols)
        for scheme in map(schemes.get, names):
            out = torch.empty((rows, cols), dtype=scheme.dtype, device=device)
            scales = torch.empty(scheme.cells(rows, cols), dtype=scheme.scale_dtype, device=device)
            if coding_is(coding, scheme):
                kernel.copy_into(out, scales, source, bad, None)
            elif kernel.makes(scheme, scheme.groups, globally is not None):
                kept = keeps(how, scheme)
                kernel.quantize_into(out, scales, source, scheme.groups, bad, lossless=kept, window=None)
        # what stays unquantized, mostly
        kernel.decode_into(torch.empty((rows, cols), dtype=torch.bfloat16, device=device), source, bad, None)
