"""From a dry run to places in the model's own memory, so that octavo's stream can write there itself.

Where the loader only moves a tensor, or part of it, the dry run has told it all: which elements go where. Such tensors
are streamed from the file to their place. Of a tensor of which this rank has some rows, only those are read; where it
has some columns, whole rows are, which is one read for all of them, and the scale of a whole row is what fp8_channel
needs. Left for the loader itself is what it computes.

What fills one parameter together (q, k and v; gate and up of all experts; a rank's columns of all down projections) is
one placement. So an accelerator quantizes neighbours in one operation: what a load takes there is the number of
launches.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...checkpoint import dtypes
from ...conversion import formats
from ...conversion.formats import Format
from ...elements.dry_run import Copy, Trace, is_run
from ...elements.pieces import Piece, contiguous_strides
from ...elements.views import View
from ...numerics import schemes
from ...planning.placement import Placement, cut_parts
from ...planning.plan import Plan
from ...streaming.sinks import Storage
from .cuts import Grid, paired


class Places(NamedTuple):
    """Two plans that together are the whole, and the memory of the first one's placements."""

    direct: Plan
    storages: Mapping[str, Storage]
    rest: Plan


def split(model: nn.Module, seen: Trace, plan: Plan, layout: Format) -> Places:
    """Which of the plan's tensors need no loader, by a dry run ``seen`` in which all went well."""
    found, memory = seen.by_source, dict(model.named_parameters()) | dict(model.named_buffers())
    rest: list[Placement] = []
    suffix = layout.scale_suffix
    homes: dict[str, list[_Part]] = {}  # parameter -> what is streamed into it
    devices = {target: str(tensor.device) for target, tensor in memory.items()}
    for placement in plan.placements:
        weights = found.get(layout.weight_name(placement), [])
        scales = found.get(layout.scale_name(placement.name), [])
        parts = None
        if formats.has_groups(placement.scheme):
            pass
        elif placement.name not in seen.used and seen.computed.isdisjoint(c.target for c in (*weights, *scales)):
            parts = (
                _quantized(placement, weights, scales, suffix)
                if placement.scheme
                else _moved(placement, weights, memory)
            )
        if parts is None or any(devices[copy.target] != placement.device for copy in (*weights, *scales)):
            rest.append(placement)
            continue
        for each in parts:
            homes.setdefault(each[1].target, []).append(each)
    direct: list[Placement] = []
    storages: dict[str, Storage] = {}
    for target, parts in homes.items():  # in the order of their first bytes
        joined = _joined(target, parts, memory, suffix)
        if joined is not None:
            direct.append(joined[0])
            storages[joined[0].name] = joined[1]
            continue
        for part, weight, scale in parts:
            direct.append(part)
            storages[part.name] = Storage(_region(memory, weight), None if scale is None else _region(memory, scale))
    order: dict[str, int] = {}
    for number, placement in enumerate(plan.placements):
        order.setdefault(placement.pieces[0].src_name, number)
    direct.sort(key=lambda p: (order[p.pieces[0].src_name], p.pieces[0].src_off))
    return Places(
        dataclasses.replace(plan, placements=tuple(direct)),
        storages,
        dataclasses.replace(plan, placements=tuple(rest)),
    )


_Part = tuple[Placement, Copy, Copy | None]
Columns = tuple[int, int] | None


def _moved(placement: Placement, copies: list[Copy], memory: Mapping[str, Tensor]) -> list[_Part] | None:
    """An unquantized tensor, once for each place that it goes to; in whatever order the axes of the place are."""
    parts: list[_Part] = []
    for number, copy in enumerate(copies):
        dtype_name = dtypes.NAMES.get(memory[copy.target].dtype)
        if copy.view is None or dtype_name is None:
            return None
        view, into = copy.view, copy.into
        rows: tuple[View, Columns] | None = (view, None)
        if not is_run(view.size, view.strides):
            axes = sorted((d for d, n in enumerate(view.size) if n > 1), key=lambda d: -view.strides[d])
            view, into = _permuted(view, axes), _permuted(into, axes)
            rows = _rows(view, view.strides[-2]) if len(axes) > 1 else None
        found = rows and _in_file(placement, *rows)
        if found is None:
            return None
        parts.append((_part(placement, number, *found, dtype_name), copy._replace(into=into), None))
    return parts


def _permuted(view: View, axes: Sequence[int]) -> View:
    return View(view.offset, tuple(view.size[d] for d in axes), tuple(view.strides[d] for d in axes))


def _rows(view: View, length: int) -> tuple[View, Columns] | None:
    """The whole rows, so long, that hold a view, and its columns of them; None where it has no rows."""
    first = view.offset % length
    columns = (first, first + view.size[-1])
    steps = zip(view.strides, view.size[1:], view.strides[1:], strict=False)
    if view.strides[-1] != 1 or columns[1] > length or any(step < size * inner for step, size, inner in steps):
        return None  # a row is left out, cut or repeated
    whole = View(view.offset - first, (*view.size[:-1], length), view.strides)
    return whole, None if columns == (0, length) else columns


def _quantized(placement: Placement, weights: list[Copy], scales: list[Copy], suffix: str) -> list[_Part] | None:
    """Matrices, or rows and columns of them, each with its scales; None where there is more to do than to move."""
    scheme = schemes.get(str(placement.scheme))
    pairs = paired(weights, scales, Grid.of(scheme, placement.shape), suffix)
    if pairs is None:
        return None
    n, k = placement.shape[-2:]
    parts: list[_Part] = []
    for number, (weight, scale) in enumerate(pairs):
        view = weight.view
        assert view is not None  # it has a pair
        # of an axis without a second element, the loader may have any stride
        rows = _rows(view._replace(strides=(*view.strides[:-2], k, 1)), k)
        found = rows and _in_file(placement, *rows)
        if found is None or (scheme.group_rows is None and view.size[-2] != n):
            return None
        parts.append((_part(placement, number, *found, placement.dtype_name), weight, scale))
    return parts


def _in_file(placement: Placement, taken: View, columns: Columns) -> tuple[Piece, Columns] | None:
    """What the loader took of a tensor, in the file, where it may lie scattered (a matrix of a stack of experts).

    None where that is neither of a tensor that lies there as it was given to the loader, nor whole rows.
    """
    (whole,) = placement.pieces
    if is_run(whole.size, whole.src_strides):
        offset = whole.src_off + taken.offset
        return Piece((0,) * len(taken.size), taken.size, whole.src_name, offset, taken.strides), columns
    length = whole.size[-1]
    if len(whole.size) != 2 or taken.size[1:] != (length,) or taken.offset % length:
        return None
    return whole.narrow(0, taken.offset // length, taken.size[0])._replace(dst_off=(0, 0)), columns


def _part(placement: Placement, number: int, piece: Piece, columns: Columns, dtype_name: str) -> Placement:
    """The placement of some elements of a tensor, or of these columns of them."""
    if piece == placement.pieces[0] and columns is None and number == 0 and dtype_name == placement.dtype_name:
        return placement
    return dataclasses.replace(
        placement,
        name=placement.name if number == 0 else f"{placement.name} ({number + 1})",
        shape=piece.size,
        dtype_name=dtype_name,
        pieces=(piece,),
        parts=(piece.size[-2],) if placement.scheme else (),
        source_bytes=piece.numel * dtypes.moved_bits(placement.source_dtype_names[0]) // 8,
        columns=columns,
    )


def _joined(
    target: str, parts: Sequence[_Part], memory: Mapping[str, Tensor], suffix: str
) -> tuple[Placement, Storage] | None:
    """All parts of a quantized parameter as one placement; None where they are not whole rows that tile it."""
    whole, scales = memory[target].detach(), memory.get(target + suffix)
    first = parts[0][0]
    alike = {
        (part.scheme, part.source_dtype_names, part.shape[-1:], part.columns, part.lossless, scale is None)
        for part, _, scale in parts
    }
    if len(parts) == 1 or len(alike) > 1 or first.scheme is None or scales is None or whole.ndim < 2:
        return None
    shape = tuple(whole.shape)
    if not (whole.is_contiguous() and scales.is_contiguous()) or first.stored_shape[-1] != shape[-1]:
        return None
    if sum(math.prod(p.stored_shape) for p, *_ in parts) != math.prod(shape):
        return None
    scheme, pieces = schemes.get(first.scheme), []
    for part, weight, scale in parts:
        lead = len(shape) - len(part.shape)
        if scale is None or lead < 0 or weight.box.size != (*[1] * lead, *part.stored_shape):
            return None
        group = scheme.group_rows or part.shape[-2]
        beside = (*weight.box.off[:-2], weight.box.off[-2] // group, 0)
        cells = scheme.cells(part.shape[-2], 1)[0]
        if weight.box.off[-2] % group or scale.box.off != beside or scale.box.size[-2] != cells:
            return None
        piece, size = part.pieces[0], (*[1] * lead, *part.shape)
        strides = (*contiguous_strides(size)[:lead], *piece.src_strides)
        pieces.append(Piece(weight.box.off, size, piece.src_name, piece.src_off, strides))
    placement = dataclasses.replace(
        first,
        name=f"{target} ({len(pieces)} tensors)",  # no tensor is called so
        ignored_as=_patterns(pieces),
        shape=(*shape[:-1], first.shape[-1]),
        pieces=tuple(pieces),
        parts=cut_parts(shape, pieces),
        source_bytes=sum(part.source_bytes for part, *_ in parts),
        codings=tuple(dict.fromkeys(coding for part, *_ in parts for coding in part.codings)),
    )
    if placement.scale_grid != tuple(scales.shape):
        return None
    return placement, Storage(whole, scales.detach())


def _patterns(pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Patterns for the names of all sources; experts, which all go together, by a star."""
    return tuple(dict.fromkeys(re.sub(r"\.experts\.\d+\.", ".experts.*.", piece.src_name) for piece in pieces))


def _region(memory: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return memory[copy.target].detach().as_strided(copy.into.size, copy.into.strides, copy.into.offset)
