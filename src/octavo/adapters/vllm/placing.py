"""From a dry run to places in the model's own memory, so that octavo's stream can write there itself.

Where the loader only moves a tensor, or rows of it, the dry run has told it all: which elements go where. Such tensors
are streamed from the file to their place; of a tensor of which this rank has some rows, only those are read. What is
left for the loader itself: whatever it computes, and columns, which lie scattered in the file and, under fp8_channel,
need the scale of the whole row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ... import dtypes, schemes
from ...formats import Format
from ...pieces import Piece
from ...plan import Placement, Plan
from ...sinks import Storage
from .tracing import Copy, Trace, View, is_run


class Places(NamedTuple):
    """Two plans that together are the whole, and the memory of the first one's placements."""

    direct: Plan
    storages: Mapping[str, Storage]
    rest: Plan


def split(model: nn.Module, seen: Trace, plan: Plan, layout: Format) -> Places:
    """Which of the plan's tensors need no loader, by a dry run ``seen`` in which all went well."""
    found, memory = seen.by_source(), dict(model.named_parameters()) | dict(model.named_buffers())
    direct: list[Placement] = []
    rest: list[Placement] = []
    storages: dict[str, Storage] = {}
    for placement in plan.placements:
        weights, scales = found.get(placement.name, []), found.get(layout.scale_name(placement.name), [])
        parts = None
        if not seen.computes and placement.name not in seen.used:
            parts = _quantized(placement, weights, scales) if placement.scheme else _moved(placement, weights, memory)
        if parts is None or any(str(memory[copy.target].device) != placement.device for copy in (*weights, *scales)):
            rest.append(placement)
            continue
        for part, weight, scale in parts:
            direct.append(part)
            storages[part.name] = Storage(_region(memory, weight), None if scale is None else _region(memory, scale))
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
        parts.append((_part(placement, number, copy.view, dtype_name), copy, None))
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
        if view is None or cells is None or len(view.size) != 2 or view.size[1] != k or not is_run(view.size, view.strides):
            return None
        row, height, group = view.offset // k, view.size[0], scheme.group_rows or n
        whole_groups = row % group == 0 and (height % group == 0 or row + height == n)
        beside = cells.offset == row // group * scheme.cells(n, k)[1] and cells.size == scheme.cells(height, k)
        if not (whole_groups and beside and scale.target == f"{weight.target}_scale"):
            return None
        parts.append((_part(placement, number, view, placement.dtype_name), weight, scale))
    return parts


def _part(placement: Placement, number: int, view: View, dtype_name: str) -> Placement:
    """The placement of some elements of a tensor."""
    piece = Piece((0,) * len(view.size), view.size, placement.name, view.offset, view.strides)
    return dataclasses.replace(
        placement,
        name=placement.name if number == 0 else f"{placement.name} ({number + 1})",
        shape=view.size,
        dtype_name=dtype_name,
        pieces=(piece,),
        parts=(view.size[0],) if placement.scheme else (),
        source_bytes=piece.numel * dtypes.moved_bits(placement.source_dtype_names[0]) // 8,
    )


def _region(memory: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return memory[copy.target].detach().as_strided(copy.into.size, copy.into.strides, copy.into.offset)
