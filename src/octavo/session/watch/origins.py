"""Whose values a write carries: the pair that a loader took, followed through what it makes of it.

Names alone would not do: loaders may collect pairs before they write, and a checkpoint may hold a name twice. So every
pair is numbered, and storages remember which pair their values came from. A storage that holds values of several (of
``torch.cat``, of staging memory, of a bucket in which tensors arrive) remembers *regions*: boxes of layouts of it.
Whatever view of it is written is cut where one region ends and another begins.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ...elements.boxes import Box
from ...elements.operations import Operation, is_view, offset_of, storage_key
from ...elements.pieces import Piece
from ...elements.views import NoBoxError, embed, trace_in

aten = torch.ops.aten
#: what puts some elements of one tensor somewhere into another
_SCATTERS = frozenset({aten.index_put_, aten.index_copy_, aten.scatter_, aten.masked_scatter_, aten.put_})
_FILLS = frozenset({aten.fill_, aten.zero_})
_COPIES = frozenset({aten.clone, aten._to_copy})
#: regions, or parts of a write, beyond which nobody follows
_MANY = 4096


class Origin(NamedTuple):
    """A pair, or a tensor that came on its own."""

    number: int
    name: str
    sure: bool = False  # the values are known to be that pair's, and not only to have come after it
    mixed: bool = False  # values of several pairs, and nobody knows which are whose

    @property
    def label(self) -> str:
        """A text that tells boxes of one origin from those of another."""
        return f"{self.name}#{self.number}"


LOADER = Origin(0, "the loader")


class _Region(NamedTuple):
    """A box of a storage, in the layout that strides describe (see `octavo.elements.views.embed`)."""

    strides: tuple[int, ...]
    box: Box
    origin: Origin

    def is_near(self, sizes: Sequence[int], strides: Sequence[int], offset: int) -> bool:
        """Return False if a view lies before the region, or behind it, by its first and last elements."""
        begin, end = sum(map(operator.mul, self.box.off, self.strides)), offset + _reach(sizes, strides)
        return bool(begin <= end and offset <= begin + _reach(self.box.size, self.strides))


def _reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))


def _is_whole(tensor: Tensor) -> bool:
    return bool(tensor.nbytes == tensor.untyped_storage().nbytes())


@dataclass(slots=True)
class _Lineage:
    """Whose values a storage holds."""

    reference: Any
    itemsize: int
    origin: Origin | None  # of what is in no region; None: nobody knows
    regions: list[_Region] = field(default_factory=list)  # later ones lie over earlier ones
    first: tuple[Any, ...] | None = None  # sizes, strides and offset of the tensor that brought the values

    def add(self, tensor: Tensor, origin: Origin) -> bool:
        """A view of the storage holds values of an origin from now on; False if regions can't say so."""
        if not self.regions and origin == self.origin:  # as all of it
            return True
        found = embed(tensor.shape, tensor.stride(), offset_of(tensor)) if tensor.itemsize == self.itemsize else None
        if found is None or len(self.regions) > _MANY:
            return False
        layout, box = found
        self.regions = [r for r in self.regions if r.strides != layout or box.common(r.box) != r.box]
        self.regions.append(_Region(layout, box, origin))
        return True


class _Span(NamedTuple):
    """Views of the same shape, of values and of their place: sizes, and strides and offset of each."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    place_strides: tuple[int, ...]
    place_offset: int

    def within(self, layout: tuple[int, ...], box: Box) -> tuple[list[_Span], list[_Span]]:
        """The views that lie in a box of a layout of the values' storage, and those that do not."""
        inside, outside = [], []
        for piece in trace_in(layout, self.sizes, self.strides, self.offset, self.place_strides, self.place_offset):
            found = piece.box
            common = found.common(box)
            if common is not None:
                inside.append(_span(piece, common, layout))
            outside += [_span(piece, rest, layout) for rest in found.without(box)]
        return (inside, outside) if inside and outside else ([self], []) if inside else ([], [self])


def _span(piece: Piece, box: Box, layout: tuple[int, ...]) -> _Span:
    steps = zip(box.off, piece.dst_off, piece.src_strides, strict=True)
    place_offset = piece.src_off + sum((a - b) * stride for a, b, stride in steps)
    return _Span(box.size, layout, sum(map(operator.mul, box.off, layout)), piece.src_strides, place_offset)


class Part(NamedTuple):
    """Values of one origin, and their place: views of the same shape."""

    place: Tensor
    values: Tensor
    origin: Origin


class _Part(NamedTuple):
    """The same; None where nobody knows whose values they are."""

    place: Tensor
    values: Tensor
    origin: Origin | None


class Origins:
    """The pair in hand, and the storages that hold values of pairs."""

    def __init__(self) -> None:
        self.current: Origin | None = None
        self.following = True  # whether somebody tells what becomes of values; else all are those of the pair in hand
        self._known: dict[int, _Lineage] = {}
        self._exposed: dict[int, Any] = {}  # storages whose memory code that is not torch's has got
        self._count, self._purge_at = 0, 64

    def take(self, name: str, tensor: Tensor) -> None:
        """A loader gets a pair."""
        self._count += 1
        self.current = Origin(self._count, name, True)
        if not self.following or storage_key(tensor) is None:
            return
        if len(self._known) > self._purge_at:
            self._known = {key: found for key, found in self._known.items() if not found.reference.expired()}
            self._purge_at = 2 * len(self._known) + 64
        found = self._lineage(tensor)
        if found is None:
            self._remember(tensor, self.current).first = (tensor.shape, tensor.stride(), offset_of(tensor))
            return
        if not found.regions and found.origin is not None:  # until now, nobody had to know where
            place = embed(*found.first) if found.first is not None else None
            found.regions = [_Region(*place, found.origin)] if place is not None else []
        found.origin = None
        # of memory that pairs share at different times, values can't tell whose they are
        shared = any(part.origin for part in self._cut(found, tensor, tensor))
        if not found.add(tensor, self.current._replace(sure=not shared)):
            found.regions = []

    def expose(self, tensor: Tensor) -> None:
        """Its memory goes to where no operation is seen."""
        if (key := storage_key(tensor)) is not None:
            self._exposed[key] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def is_seen(self, values: Tensor) -> bool:
        """Return True if memory changes by operations alone: a pair's, whose owner waits, or a loader's own."""
        found, key = self._lineage(values), storage_key(values)
        if found is None or key in self._exposed:
            return False
        return found.first is not None or values.untyped_storage().resizable()

    def of(self, values: Tensor | None) -> Origin:
        """The origin of values; of those that a loader makes of nothing, the pair in hand."""
        found = None if values is None else self._lineage(values)
        if found is None or values is None:
            return self._in_hand(values)
        if not found.regions:
            return found.origin or self._in_hand(values)
        return self._together([part.origin or self._in_hand(values) for part in self._cut(found, values, values)])

    def of_any(self, inputs: Iterable[Tensor]) -> Origin:
        """The origin of what is computed of several tensors: that of the first that is known."""
        return self.of(next((tensor for tensor in inputs if self._lineage(tensor) is not None), None))

    def split(self, place: Tensor, values: Tensor) -> list[Part]:
        """A write, cut where values of one pair end and those of another begin."""
        found = self._lineage(values)
        if found is None or not found.regions:
            return [Part(place, values, self.of(values))]
        parts = self._cut(found, place, values.expand(place.shape))
        return [Part(part.place, part.values, part.origin or self._in_hand(values)) for part in parts]

    def computed(self, done: Operation) -> None:
        """An operation in which no item took part."""
        func, args, inputs, targets, made = done
        if not self._known:
            return
        packet = func.overloadpacket
        for target in targets:
            values = [tensor for tensor in inputs if tensor is not target]
            if packet in _FILLS and _is_whole(target):
                self._known.pop(storage_key(target) or 0, None)  # no more than memory that is new
            elif packet is aten.copy_:
                self._written(target, self._parts(target, values[0]) if values else [])
            elif "out" in func._overloadname or self._lineage(target) is None:
                self._written(target, self._made_of(func, target, values))
            elif packet in _SCATTERS:
                known = [self.of(tensor) for tensor in (target, *values) if self._lineage(tensor) is not None]
                self._written(target, [_Part(target, target, self._together(known))])
        for tensor in made if not targets and not is_view(func) else ():
            if storage_key(tensor) is None or self._lineage(tensor) is not None:
                continue
            dim = (args[1] if len(args) > 1 else 0) if packet in (aten.cat, aten.stack) else 0
            if packet is aten.cat:
                places = torch.split(tensor, [t.shape[dim] if t.ndim == tensor.ndim else 0 for t in inputs], dim)
                parts = [part for place, t in zip(places, inputs, strict=True) for part in self._parts(place, t)]
            elif packet is aten.stack:
                parts = [p for place, t in zip(tensor.unbind(dim), inputs, strict=True) for p in self._parts(place, t)]
            else:
                parts = self._made_of(func, tensor, inputs)
            self._written(tensor, parts)

    def clear(self) -> None:
        self.current = None
        self._known.clear()
        self._exposed.clear()

    # -- storages -----------------------------------------------------------------------------------------------------

    def _lineage(self, tensor: Tensor) -> _Lineage | None:
        key = storage_key(tensor) if self._known else None
        return None if key is None else self._known.get(key)

    def _remember(self, tensor: Tensor, origin: Origin | None) -> _Lineage:
        reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        found = self._known[storage_key(tensor) or 0] = _Lineage(reference, tensor.itemsize, origin)
        return found

    def _in_hand(self, values: Tensor | None) -> Origin:
        """The origin of values that nobody knows: it is the pair in hand, or the tensor itself."""
        if self.current is not None:
            return self.current._replace(sure=False)
        if values is None or storage_key(values) is None:
            return LOADER
        self._count += 1
        origin = Origin(self._count, "an unnamed tensor")
        if self._lineage(values) is None:
            self._remember(values, origin)
        return origin

    def _together(self, origins: Iterable[Origin]) -> Origin:
        """One for all: the one that they are, or one that tells that nobody knows."""
        found = list(dict.fromkeys(origins))
        if len(found) == 1:
            return found[0]
        self._count += 1
        return Origin(self._count, ", ".join(dict.fromkeys(origin.name for origin in found)), mixed=True)

    def _written(self, target: Tensor, parts: Sequence[_Part]) -> None:
        """Memory gets values of origins."""
        known = [(part.place, part.origin) for part in parts if part.origin is not None]
        if not known or storage_key(target) is None:
            return
        whole = _is_whole(target)
        origins = list(dict.fromkeys(origin for _, origin in known))
        found = self._lineage(target)
        if len(origins) == 1 and (whole or found is None):
            self._remember(target, origins[0])
            return
        if whole or found is None:
            found = self._remember(target, origins[0])
        followed = [found.add(place, origin) for place, origin in known]
        if not all(followed):
            self._remember(target, self._together([*origins, *([found.origin] if found.origin else [])]))

    def _made_of(self, func: Any, made: Tensor, inputs: Sequence[Tensor]) -> list[_Part]:
        """The parts of a result: the first input of a known pair tells whose it is, element by element if it can."""
        by_element = torch.Tag.pointwise in func.tags or func.overloadpacket in _COPIES
        for tensor in inputs:
            found = self._lineage(tensor)
            if found is None:
                continue
            if not found.regions or (by_element and tensor.shape == made.shape):
                return self._parts(made, tensor)
            return [_Part(made, made, self.of(tensor))]
        return []

    def _parts(self, place: Tensor, values: Tensor) -> list[_Part]:
        found = self._lineage(values)
        if found is None:
            return []
        return (
            self._cut(found, place, values.expand(place.shape))
            if found.regions
            else [_Part(place, place, found.origin)]
        )

    def _cut(self, found: _Lineage, place: Tensor, values: Tensor) -> list[_Part]:
        """Values of a storage, cut along its regions, and their places."""
        view = tuple(values.shape), values.stride(), offset_of(values)
        near = [region for region in found.regions if values.itemsize != found.itemsize or region.is_near(*view)]
        spans: list[tuple[_Span, Origin | None]] = []
        rest = [_Span(*view, place.stride(), offset_of(place))]
        try:
            if values.itemsize != found.itemsize:
                raise NoBoxError("other elements")
            for region in reversed(near):
                both = [span.within(region.strides, region.box) for span in rest]
                spans += [(span, region.origin) for inside, _ in both for span in inside]
                rest = [span for _, outside in both for span in outside]
                if len(spans) + len(rest) > _MANY:
                    raise NoBoxError("too many parts")
        except NoBoxError:
            return [_Part(place, values, self._together([region.origin for region in near]) if near else found.origin)]
        spans += [(span, found.origin) for span in rest]
        if len({origin for _, origin in spans}) <= 1:
            return [_Part(place, values, spans[0][1] if spans else found.origin)]
        return [
            _Part(
                place.as_strided(span.sizes, span.place_strides, span.place_offset),
                values.as_strided(span.sizes, span.strides, span.offset),
                origin,
            )
            for span, origin in spans
        ]
