"""From a dry run to places in the model's own memory, so that octavo's stream can write there itself.

Where the loader only moves a tensor, or rows of it, the dry run has told it all: which elements go where. Such tensors
are streamed from the file to their place; of a tensor of which this rank has some rows, only those are read. What is
left for the loader itself: whatever it computes, and columns, which lie scattered in the file and, under fp8_channel,
need the scale of the whole row.

What fills one parameter together (q, k and v; gate and up of all experts) is one placement. So an accelerator quantizes
neighbours in one operation: what a load takes there is the number of launches.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...checkpoint import dtypes
from ...conversion.formats import Format
from ...elements.dry_run import Copy, Trace, View, is_run
from ...elements.pieces import Piece, contiguous_strides
from ...numerics import schemes
from ...planning.placement import Placement, cut_parts
from ...planning.plan import Plan
from ...streaming.sinks import Storage


class Places(NamedTuple):
    """Two plans that together are the whole, and the memory of the first one's placements."""

    direct: Plan
    storages: Mapping[str, Storage]
    rest: Plan


def split(model: nn.Module, seen: Trace, plan: Plan, layout: Format) -> Places:
    """Which of the plan's tensors need no loader, by a dry run ``seen`` in which all went well."""
    found, memory = seen.by_source(), dict(model.named_parameters()) | dict(model.named_buffers())
    rest: list[Placement] = []
    homes: dict[str, list[_Part]] = {}  # parameter -> what is streamed into it
    devices = {target: str(tensor.device) for target, tensor in memory.items()}
    for placement in plan.placements:
        weights, scales = found.get(placement.name, []), found.get(layout.scale_name(placement.name), [])
        parts = None
        if not seen.computes and placement.name not in seen.used:
            parts = _quantized(placement, weights, scales) if placement.scheme else _moved(placement, weights, memory)
        if parts is None or any(devices[copy.target] != placement.device for copy in (*weights, *scales)):
            rest.append(placement)
            continue
        for each in parts:
            homes.setdefault(each[1].target, []).append(each)
    direct: list[Placement] = []
    storages: dict[str, Storage] = {}
    for target, parts in homes.items():  # in the order of their first bytes
        joined = _joined(target, parts, memory)
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
    direct.sort(key=lambda p: order[p.pieces[0].src_name])
    return Places(
        dataclasses.replace(plan, placements=tuple(direct)),
        storages,
        dataclasses.replace(plan, placements=tuple(rest)),
    )


_Part = tuple[Placement, Copy, Copy | None]


def _moved(placement: Placement, copies: list[Copy], memory: Mapping[str, Tensor]) -> list[_Part] | None:
    """An unquantized tensor, once for each place that it goes to."""
    parts: list[_Part] = []
    for number, copy in enumerate(copies):
        dtype_name = dtypes.NAMES.get(memory[copy.target].dtype)
        if copy.view is None or dtype_name is None or not is_run(copy.view.size, copy.view.strides):
            return None
        piece = _in_file(placement, copy.view)
        if piece is None:
            return None
        parts.append((_part(placement, number, piece, dtype_name), copy, None))
    return parts


def _quantized(placement: Placement, weights: list[Copy], scales: list[Copy]) -> list[_Part] | None:
    """A matrix, or rows of it, each with the scales that lie beside it; None where there is more to do than to move."""
    if len(placement.shape) != 2 or len(weights) != len(scales):
        return None
    scheme = schemes.get(str(placement.scheme))
    n, k = placement.shape
    parts: list[_Part] = []
    for number, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        view, cells = weight.view, scale.view
        if view is None or cells is None or len(view.size) != 2 or view.size[1] != k:
            return None
        if not is_run(view.size, view.strides):
            return None
        row, height, group = view.offset // k, view.size[0], scheme.group_rows or n
        whole_groups = row % group == 0 and (height % group == 0 or row + height == n)
        beside = cells.offset == row // group * scheme.cells(n, k)[1] and cells.size == scheme.cells(height, k)
        piece = _in_file(placement, view)
        if piece is None or not (whole_groups and beside and scale.target == f"{weight.target}_scale"):
            return None
        parts.append((_part(placement, number, piece, placement.dtype_name), weight, scale))
    return parts


def _in_file(placement: Placement, view: View) -> Piece | None:
    """What the loader took of a tensor, in the file, where it may lie scattered (a matrix of a stack of experts).

    None where that is neither of a tensor that lies there as it was given to the loader, nor whole rows.
    """
    (whole,) = placement.pieces
    if is_run(whole.size, whole.src_strides):
        return Piece((0,) * len(view.size), view.size, whole.src_name, whole.src_off + view.offset, view.strides)
    columns = whole.size[-1]
    if len(whole.size) != 2 or view.size[1:] != (columns,) or view.offset % columns:
        return None
    return whole.narrow(0, view.offset // columns, view.size[0])._replace(dst_off=(0, 0))


def _part(placement: Placement, number: int, piece: Piece, dtype_name: str) -> Placement:
    """The placement of some elements of a tensor."""
    if piece == placement.pieces[0] and number == 0 and dtype_name == placement.dtype_name:
        return placement
    return dataclasses.replace(
        placement,
        name=placement.name if number == 0 else f"{placement.name} ({number + 1})",
        shape=piece.size,
        dtype_name=dtype_name,
        pieces=(piece,),
        parts=(piece.size[0],) if placement.scheme else (),
        source_bytes=piece.numel * dtypes.moved_bits(placement.source_dtype_names[0]) // 8,
    )


def _joined(target: str, parts: Sequence[_Part], memory: Mapping[str, Tensor]) -> tuple[Placement, Storage] | None:
    """All parts of a quantized parameter as one placement; None where they are not whole rows that tile it."""
    whole, scales = memory[target].detach(), memory.get(f"{target}_scale")
    first = parts[0][0]
    alike = {(part.scheme, part.source_dtype_names, scale is None) for part, _, scale in parts}
    if len(parts) == 1 or len(alike) > 1 or first.scheme is None or scales is None or whole.ndim < 2:
        return None
    shape = tuple(whole.shape)
    if not (whole.is_contiguous() and scales.is_contiguous()) or sum(math.prod(p.shape) for p, *_ in parts) != (
        math.prod(shape)
    ):
        return None
    scheme, pieces = schemes.get(first.scheme), []
    for part, weight, scale in parts:
        lead = len(shape) - len(part.shape)
        if scale is None or weight.box.size != (*[1] * lead, *part.shape) or part.shape[1] != shape[-1]:
            return None
        group = scheme.group_rows or part.shape[0]
        beside = (*weight.box.off[:-2], weight.box.off[-2] // group, 0)
        if weight.box.off[-2] % group or scale.box.off != beside or scale.box.size[-2:] != scheme.cells(*part.shape):
            return None
        piece = part.pieces[0]
        strides = (*contiguous_strides(weight.box.size)[:lead], *piece.src_strides)
        pieces.append(Piece(*weight.box, piece.src_name, piece.src_off, strides))
    placement = dataclasses.replace(
        first,
        name=f"{target} ({len(pieces)} tensors)",  # no tensor is called so
        ignored_as=_patterns(pieces),
        shape=shape,
        pieces=tuple(pieces),
        parts=cut_parts(shape, pieces),
        source_bytes=sum(part.source_bytes for part, *_ in parts),
    )
    if placement.scale_grid != tuple(scales.shape):
        return None
    return placement, Storage(whole, scales.detach())


def _patterns(pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Patterns for the names of all sources; experts, which all go together, by a star."""
    return tuple(dict.fromkeys(re.sub(r"\.experts\.\d+\.", ".experts.*.", piece.src_name) for piece in pieces))


def _region(memory: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return memory[copy.target].detach().as_strided(copy.into.size, copy.into.strides, copy.into.offset)
