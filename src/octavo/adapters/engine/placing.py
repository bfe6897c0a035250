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
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...checkpoint import dtypes
from ...conversion import formats, packing
from ...conversion.formats import Format
from ...elements.dry_run import Copy, Trace, is_run
from ...elements.pieces import Piece, contiguous_strides
from ...elements.views import View, layout_of
from ...numerics import schemes
from ...numerics.nvfp4 import Packed
from ...numerics.schemes import Scheme
from ...planning.placement import Placement, cut_parts
from ...planning.plan import Plan
from ...streaming.sinks import Memory, PackedStorage, Storage, WordStorage
from .cuts import Grid, is_turned, paired, unpacked


class Places(NamedTuple):
    """Two plans that together are the whole, and the memory of the first one's placements."""

    direct: Plan
    storages: Mapping[str, Memory]
    rest: Plan


class _Part(NamedTuple):
    """Elements of a tensor, and where the loader puts them and their scales."""

    placement: Placement
    weight: Copy
    scale: Copy | None = None
    over: Copy | None = None  # of numbers that have scales among them, the one over all


def split(model: nn.Module, seen: Trace, plan: Plan, layout: Format) -> Places:
    """Which of the plan's tensors need no loader, by a dry run ``seen`` in which all went well."""
    found, memory = seen.by_source, dict(model.named_parameters()) | dict(model.named_buffers())
    rest: list[Placement] = []
    homes: dict[str, list[_Part]] = {}  # parameter -> what is streamed into it
    devices = {target: str(tensor.device) for target, tensor in memory.items()}
    for placement in plan.placements:
        weights = found.get(layout.weight_name(placement), [])
        scales = found.get(layout.scale_name(placement.name), [])
        over = found.get(placement.name + packing.GLOBAL, []) if formats.has_groups(placement.scheme) else []
        parts, copies = None, (*weights, *scales, *over)
        facts = [copy for name in layout.beside(placement) for copy in found.get(name, ())] if placement.scheme else []
        followed = all(fact.view is not None for fact in facts)
        if followed and placement.name not in seen.used and seen.computed.isdisjoint(c.target for c in copies):
            parts = (
                _quantized(placement, weights, scales, over, layout)
                if placement.scheme
                else _moved(placement, weights, memory)
            )
        if parts is None or any(devices[copy.target] != placement.device for copy in copies):
            rest.append(placement)
            continue
        for each in parts:
            homes.setdefault(each.weight.target, []).append(each)
    direct: list[Placement] = []
    storages: dict[str, Memory] = {}
    for target, parts in homes.items():  # in the order of their first bytes
        joined = _joined(target, parts, memory, layout)
        if joined is not None:
            direct.append(joined[0])
            storages[joined[0].name] = joined[1]
            continue
        for part in parts:
            direct.append(part.placement)
            storages[part.placement.name] = _storage(part, memory, layout)
    order: dict[str, int] = {}
    for number, placement in enumerate(plan.placements):
        order.setdefault(placement.pieces[0].src_name, number)
    direct.sort(key=lambda p: (order[p.pieces[0].src_name], p.pieces[0].src_off))
    return Places(
        dataclasses.replace(plan, placements=tuple(direct)),
        storages,
        dataclasses.replace(plan, placements=tuple(rest)),
    )


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
        parts.append(_Part(_part(placement, number, *found, dtype_name), copy._replace(into=into)))
    return parts


def _permuted(view: View, axes: Sequence[int]) -> View:
    return View(view.offset, tuple(view.size[d] for d in axes), tuple(view.strides[d] for d in axes))


@functools.lru_cache(maxsize=4096)  # a model has thousands of matrices, and few shapes of them
def _rows(view: View, length: int) -> tuple[View, Columns] | None:
    """The whole rows, so long, that hold a view, and its columns of them; None where it has no rows."""
    first = view.offset % length
    columns = (first, first + view.size[-1])
    steps = zip(view.strides, view.size[1:], view.strides[1:], strict=False)
    if view.strides[-1] != 1 or columns[1] > length or any(step < size * inner for step, size, inner in steps):
        return None  # a row is left out, cut or repeated
    whole = View(view.offset - first, (*view.size[:-1], length), view.strides)
    return whole, None if columns == (0, length) else columns


def _storage(part: _Part, memory: Mapping[str, Tensor], layout: Format) -> Memory:
    """The memory that the loader puts them into."""
    weight, scale = _region(memory, part.weight), None if part.scale is None else _region(memory, part.scale)
    if scale is not None and part.over is not None:
        return PackedStorage(Packed(weight, scale), _region(memory, part.over))
    return memory_like(weight, scale, part.placement.scheme, layout)


def memory_like(weight: Tensor, scale: Tensor | None, scheme: str | None, layout: Format) -> Storage | WordStorage:
    """Parameters with a weight and its scales, as a stream writes into them."""
    if scale is None or not layout.packs(scheme):
        return Storage(weight, scale)
    return WordStorage(weight, scale, functools.partial(layout.to_bytes, scheme))


def _quantized(
    placement: Placement, weights: list[Copy], scales: list[Copy], over: list[Copy], layout: Format
) -> list[_Part] | None:
    """Matrices, or rows and columns of them, each with its scales; None where there is more to do than to move."""
    scheme, each = schemes.get(str(placement.scheme)), layout.numbers_each(placement.scheme)
    turned = any(map(is_turned, weights))  # which the loader does to numbers that are quantized
    pairs = None if turned else paired(weights, scales, Grid.of(scheme, placement.shape, each), layout.scale_suffix)
    if pairs is None or (scales and not pairs):  # a part of padding alone has the scales of the whole
        return None
    n, k = placement.shape[-2:]
    parts: list[_Part] = []
    for number, (weight, scale) in enumerate(pairs):
        view = weight.view
        assert view is not None  # it has a pair
        beside = [copy for copy in over if copy.target == unpacked(weight.target) + packing.GLOBAL]
        if scheme.packed and (len(beside) != 1 or math.prod(beside[0].into.size) != 1 or len(view.size) != 2):
            return None
        if each > 1:
            view = _widened(view, each)
        # of an axis without a second element, the loader may have any stride
        rows = _rows(view._replace(strides=(*view.strides[:-2], k, 1)), k)
        found = rows and _in_file(placement, *rows)
        if found is None or (scheme.group_rows is None and view.size[-2] != n):
            return None
        part = _part(placement, number, *found, placement.dtype_name)
        parts.append(_Part(part, weight, scale, beside[0] if beside else None))
    return parts


def _widened(view: View, each: int) -> View:
    """What a view of elements, each of which is so many numbers, is of these."""
    size, strides = view.size, view.strides
    return View(each * view.offset, (*size[:-1], each * size[-1]), (*(each * step for step in strides[:-1]), 1))


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
    target: str, parts: Sequence[_Part], memory: Mapping[str, Tensor], layout: Format
) -> tuple[Placement, Memory] | None:
    """All parts of a quantized parameter as one placement; None where they are not whole rows that tile it."""
    whole, scales = memory[target].detach(), memory.get(unpacked(target) + layout.scale_suffix)
    first = parts[0].placement
    alike = {
        (p.scheme, p.source_dtype_names, p.shape[-1:], p.columns, p.lossless, scale is None) for p, _, scale, _ in parts
    }
    if len(parts) == 1 or len(alike) > 1 or first.scheme is None or scales is None or whole.ndim < 2:
        return None
    scheme, each = schemes.get(first.scheme), layout.numbers_each(first.scheme)
    shape = (*whole.shape[:-1], each * whole.shape[-1])
    if not (whole.is_contiguous() and scales.is_contiguous()) or first.stored_shape[-1] != shape[-1]:
        return None
    if sum(math.prod(part.placement.stored_shape) for part in parts) != math.prod(shape):
        return None
    pieces = []
    for part in parts:
        if not _lies_beside(part, len(shape), scheme, each):
            return None
        piece, lead = part.placement.pieces[0], len(shape) - len(part.placement.shape)
        size, off = (*[1] * lead, *part.placement.shape), part.weight.box.off
        strides = (*contiguous_strides(size)[:lead], *piece.src_strides)
        pieces.append(Piece(off, size, piece.src_name, piece.src_off, strides))
    placement = dataclasses.replace(
        first,
        name=f"{target} ({len(pieces)} tensors)",  # no tensor is called so
        ignored_as=_patterns(pieces),
        shape=(*shape[:-1], first.shape[-1]),
        pieces=tuple(pieces),
        parts=cut_parts(shape, pieces),
        source_bytes=sum(part.placement.source_bytes for part in parts),
        codings=tuple(dict.fromkeys(coding for part in parts for coding in part.placement.codings)),
    )
    if scheme.packed:
        divisors = _divisors(target, placement, [part.over for part in parts], memory)
        return None if divisors is None else (placement, PackedStorage(Packed(whole, scales.detach()), divisors))
    if placement.scale_grid != tuple(scales.shape):
        return None
    return placement, memory_like(whole, scales.detach(), placement.scheme, layout)


def _lies_beside(part: _Part, axes: int, scheme: Scheme, each: int) -> bool:
    """Return True if whole rows, and their scales, lie at the same place of parameters with so many axes."""
    placement, weight, scale, _ = part
    lead, rows = axes - len(placement.shape), placement.shape[-2]
    stored = (*placement.stored_shape[:-1], placement.stored_shape[-1] // each)
    if scale is None or lead < 0 or weight.box.size != (*[1] * lead, *stored):
        return False
    group = 1 if scheme.packed else scheme.group_rows or rows
    at, cells = (*weight.box.off[:-2], weight.box.off[-2] // group, 0), math.ceil(rows / group)
    return not weight.box.off[-2] % group and scale.box.off == at and scale.box.size[-2] == cells


def _divisors(
    target: str, placement: Placement, over: Sequence[Copy | None], memory: Mapping[str, Tensor]
) -> Tensor | None:
    """The parameter with one by the scale over each part; None where it does not have them in the order of the rows."""
    found = memory[unpacked(target) + packing.GLOBAL].detach()
    if not found.is_contiguous() or found.numel() != math.prod(placement.scale_grid):
        return None
    numbers = {part.start: number for number, part in enumerate(placement.grid.each_part)}
    for piece, copy in zip(placement.pieces, over, strict=True):
        *lead, row, _ = piece.dst_off
        at = (*lead, numbers.get(row, -1))
        if copy is None or copy.box.off not in (at, at[:-1] if len(numbers) == 1 else at):
            return None
    return found


def _patterns(pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Patterns for the names of all sources; experts, which all go together, by a star."""
    return tuple(dict.fromkeys(re.sub(r"\.experts\.\d+\.", ".experts.*.", piece.src_name) for piece in pieces))


def write_facts(model: nn.Module, seen: Trace, facts: Mapping[str, Tensor]) -> list[Copy]:
    """Write what is known of weights without reading them where the loader puts it; the constants that this is."""
    memory = dict(model.named_parameters()) | dict(model.named_buffers())
    found: dict[str, list[tuple[View, tuple[int, ...]]]] = {}
    for name, value in facts.items():
        for copy in seen.by_source.get(name, ()):
            assert copy.view is not None  # as `split` has seen
            taken = value.as_strided(copy.view.size, copy.view.strides, copy.view.offset)
            found.setdefault(copy.target, []).append((copy.into, tuple(taken.flatten().tolist())))
    return [constant for target, mine in found.items() for constant in _constants(target, memory[target], mine)]


def _constants(target: str, tensor: Tensor, mine: list[tuple[View, tuple[int, ...]]]) -> Iterator[Copy]:
    """Write facts as constants: one for each column where all rows are alike, as experts are."""
    whole, values = View.of(tensor), {row for _, row in mine}
    filled = sum(math.prod(view.size) for view, _ in mine)
    if len(values) == 1 and filled == tensor.numel() and tensor.shape[-1:] == (len(mine[0][1]),):
        mine = [(whole, values.pop())]
    for (offset, size, strides), row in mine:
        for column, number in enumerate(row):
            part = View(offset + column * strides[-1], (*size[:-1], 1), strides)
            tensor.detach().as_strided(part.size, part.strides, part.offset).fill_(number)
            box = next(iter(layout_of(whole.size, whole.strides).boxes(part.offset - whole.offset, *part[1:])))
            yield Copy(target, box, frozenset(), None, part)


def _region(memory: Mapping[str, Tensor], copy: Copy) -> Tensor:
    return memory[copy.target].detach().as_strided(copy.into.size, copy.into.strides, copy.into.offset)
