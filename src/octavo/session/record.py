"""Run a loader once without data, see which slice of which checkpoint tensor goes where, and get a plan out of it.

Checkpoint tensors are symbols made from headers (`octavo.elements.symbolic.Symbolic`); a write of one to a parameter
gives pieces.
Coverage is checked before a weight byte is read, and a stream of the plan reads the slices that this rank needs and
no others. A loader that computes breaks the thread: the parameters that it computes, and whatever else their tensors
make, are loaded the online way, by the loader itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import TensorInfo
from ..checkpoint.packing import are_codes
from ..elements.boxes import Gaps
from ..elements.operations import PlainDispatchMode, is_view, storage_key, written
from ..elements.pieces import Piece, whole
from ..elements.symbolic import HANDLERS, NotMovementError, Symbolic
from ..elements.views import trace_view
from ..errors import CoverageError, LoaderError, raise_problems
from ..planning.placement import Target
from ..planning.plan import Plan, make_plan
from ..planning.recipe import Recipe
from ..streaming.files import Files
from .inventory import Inventory
from .parameters import Item, kind_of

aten = torch.ops.aten
Loader = Callable[[Iterable[tuple[str, Tensor]]], Any]


@dataclass
class _Record:
    """One item, as the recorder saw it."""

    gaps: Gaps
    pieces: list[Piece] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    breaks: str | None = None  # why its pieces don't tell its values


@dataclass(frozen=True)
class Recording:
    """A plan, and what it can't do."""

    plan: Plan
    checkpoint: Checkpoint
    load: Loader
    online: Mapping[str, str]  # parameter -> why the loader itself has to load it
    online_sources: tuple[str, ...]

    def online_pairs(self) -> Generator[tuple[str, Tensor], None, None]:
        """The tensors that the loader itself has to load, in file order."""
        with contextlib.closing(Files.of(self.checkpoint)) as files:
            for name in self.online_sources:
                info = self.checkpoint.tensors[name]
                yield name, files.read_values(info, whole(name, info.shape))
            files.check_unchanged()


class Recorder(PlainDispatchMode):
    """Follows symbols through a loader; nothing is read, and nothing is written to parameters."""

    def __init__(self, inventory: Inventory, infos: Mapping[str, TensorInfo]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inventory, self._infos = inventory, infos
        self.records: dict[str, _Record] = {}
        self.changed: dict[str, str] = {}  # source -> what changed its values, or memory that they went to
        self.mixed: dict[str, set[str]] = {}  # source -> those whose values may have come into its own
        self.problems: list[str] = []
        self._roots: dict[int, tuple[Any, frozenset[str], str]] = {}  # storage of computed values -> sources, by what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        find = self._inventory.find
        targets = [(tensor, item) for tensor in written(func, args, kwargs) if (item := find(tensor)) is not None]
        if targets:
            return self._write(func, args, leaves, targets)
        symbols = [leaf for leaf in leaves if isinstance(leaf, Symbolic)]
        computed = [leaf for leaf in leaves if self._root(leaf) is not None]
        if not symbols and not computed:
            return func(*args, **kwargs)
        if places := written(func, args, kwargs):
            return self._change(func, leaves, places)
        if not symbols and is_view(func):
            return func(*args, **kwargs)  # of the same memory, which is known
        if symbols and not computed:
            handler = HANDLERS.get(func.overloadpacket)
            if handler is not None:
                try:
                    return handler(*args, **kwargs)
                except NotMovementError:
                    pass
        return self._compute(func, leaves, spec)

    def _write(self, func: Any, args: Any, leaves: list[Any], targets: list[tuple[Tensor, Item]]) -> Any:
        for view, item in targets:
            if not view.numel():
                continue
            record = self.records.setdefault(item.name, _Record(Gaps(item.shape)))
            values = args[1] if func.overloadpacket is aten.copy_ else None
            if isinstance(values, Symbolic):
                self._copy(item, record, view, values)
                continue
            sources, why = self._sources(leaves)
            record.sources |= sources
            record.breaks = why or f"the loader writes it with {func.overloadpacket}"
        return targets[0][0]

    def _copy(self, item: Item, record: _Record, view: Tensor, values: Symbolic) -> None:
        record.sources |= {piece.src_name for piece in values.pieces}
        while values.ndim < view.ndim:
            values = HANDLERS[aten.unsqueeze](values, 0)
        if values.shape != view.shape:
            record.breaks = f"{list(values.shape)} is spread over {list(view.shape)}"
            return
        made: list[Piece] = []
        try:
            offset, _, strides = item.elements(view)
            for piece in values.pieces:  # a box of the view, and where it comes from
                at = offset + sum(a * stride for a, stride in zip(piece.dst_off, strides, strict=True))
                source = piece.src_strides, piece.src_off, piece.src_name
                made += trace_view(item.shape, item.strides, at, piece.size, strides, *source)
        except ValueError as error:
            record.breaks = str(error)
            return
        for piece in made:
            if (again := record.gaps.written(piece.box)) is not None:
                others = {p.src_name for p in record.pieces if again.common(p.box)}
                if others == {piece.src_name}:
                    record.breaks = "the loader writes it more than once"
                else:
                    self.problems.append(
                        f"{item.name}{again} is written twice: by {', '.join(sorted(others))}, and by {piece.src_name}"
                    )
            record.gaps.fill(piece.box)
            record.pieces.append(piece)
        if values.dtype != item.dtype:
            record.breaks = f"cast from {dtypes.short(values.dtype)} to {dtypes.short(item.dtype)}"
        elif item.dtype.is_floating_point and item.dtype.itemsize > 1:
            sources = (self._infos[piece.src_name] for piece in values.pieces)
            coded = next((info for info in sources if are_codes(info.dtype_name, len(info.shape))), None)
            if coded is not None:
                record.breaks = f"{coded.name} is {dtypes.short(coded.dtype)}, and means nothing without its scale"

    def _compute(self, func: Any, leaves: list[Any], spec: Any) -> Any:
        """An operation on values that nobody has: carried out on shapes alone."""
        sources, why = self._sources(leaves)
        if func.overloadpacket in (aten._local_scalar_dense, aten.equal, aten.is_nonzero):
            raise LoaderError(_unknown(func, sources))  # what it would do with an invented value, nobody knows
        shapes = [_on_meta(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        shapes = [torch.device("meta") if isinstance(leaf, torch.device) else leaf for leaf in shapes]
        args, kwargs = tree_unflatten(shapes, spec)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raise LoaderError(_unknown(func, sources)) from error

        def remember(tensor: Tensor) -> Tensor:
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            if not is_view(func) or storage_key(tensor) not in self._roots:
                self._roots[storage_key(tensor) or 0] = (
                    reference,
                    sources,
                    why or f"computed by {func.overloadpacket}",
                )
            return tensor

        return tree_map_only(Tensor, remember, result)

    def _change(self, func: Any, leaves: list[Any], places: list[Tensor]) -> Any:
        """Values change in place: whatever their sources make, before or after, only the loader can tell."""
        sources, _ = self._sources(leaves)
        why = f"changed in place by {func.overloadpacket}"
        for name in sources:
            self.changed.setdefault(name, why)
            self.mixed.setdefault(name, set()).update(sources)
        for place in places:
            if not isinstance(place, Symbolic) and (key := storage_key(place)) is not None:
                reference = StorageWeakRef(place.untyped_storage())  # type: ignore[no-untyped-call]
                self._roots[key] = reference, sources, why
        returned = len(func._schema.returns)
        return None if not returned else places[0] if returned == 1 else tuple(places)

    def sources_of(self, record: _Record) -> set[str]:
        """The sources of a record, and those whose values came into theirs."""
        found, queue = set(record.sources), list(record.sources)
        while queue:
            more = self.mixed.get(queue.pop(), set()) - found
            found |= more
            queue += more
        return found

    def _root(self, leaf: Any) -> tuple[Any, frozenset[str], str] | None:
        if not isinstance(leaf, Tensor) or (key := storage_key(leaf)) is None:
            return None
        return self._roots.get(key)

    def _sources(self, leaves: list[Any]) -> tuple[frozenset[str], str | None]:
        """The checkpoint tensors that take part, and what was computed of them before."""
        sources, why = set(), None
        for leaf in leaves:
            if isinstance(leaf, Symbolic):
                sources |= {piece.src_name for piece in leaf.pieces}
            elif (root := self._root(leaf)) is not None:
                sources |= root[1]
                why = root[2]
        return frozenset(sources), why


def _unknown(func: Any, sources: Iterable[str]) -> str:
    names = ", ".join(sorted(sources))
    return f"the loader can't be recorded: {func} needs the values of {names}. Load online: session.load, or pairs."


def _on_meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Symbolic) or not tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor


def record(
    inventory: Inventory,
    checkpoint: Checkpoint,
    recipe: Recipe,
    load: Loader,
    pairs: Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]],
    staging_bytes: int,
) -> Recording:
    """Run ``load`` on symbols and make a plan of what it does.

    Args:
        pairs: what stands between the checkpoint and the loader (a transform).

    Raises:
        CoverageError: parameters that the checkpoint does not tile, or that are written twice: all are named.
        LoaderError: the loader needs values in a way that shapes can't stand for.
    """
    for item in inventory.items:
        inventory.track(item, item.faces[0].tensor)
    symbols = ((name, Symbolic.source(name, info.shape, info.dtype)) for name, info in checkpoint.tensors.items())
    recorder = Recorder(inventory, checkpoint.tensors)
    try:
        with torch.no_grad(), recorder:
            load(pairs(symbols))
    finally:
        inventory.untrack()
    records = recorder.records
    for found in records.values():
        found.sources = recorder.sources_of(found)
    online, sources = _online(inventory, records, recorder.changed)
    problems = list(recorder.problems)
    for item in inventory.items:
        found = records.get(item.name) or _Record(Gaps(item.shape))
        for box in item.padding:
            found.gaps.fill(box)
        if found.gaps and item.required and found.breaks is None:
            what = f"nothing would write {found.gaps}" if found.pieces else "no checkpoint tensor goes there"
            problems.append(f"{item.name} {list(item.shape)}: {what}")
    raise_problems(CoverageError, f"{checkpoint.path} into {type(inventory.model).__name__}", problems)

    planned = [item for item in inventory.items if item.name in records and item.name not in online]
    targets = [
        Target(item.name, item.shape, item.dtype, kind_of(item), tuple(records[item.name].pieces), str(item.device),
               transposed=item.transposed)
        for item in planned
    ]  # fmt: skip
    chosen = Recipe(None, {item.name: item.scheme for item in planned if item.scheme})
    used = {name for found in records.values() for name in found.sources}
    unused = {name: "no parameter of this rank takes it" for name in checkpoint.tensors if name not in used}
    other: dict[str, int] = {}
    for item in inventory.items:
        if item not in planned:
            other[str(item.device)] = other.get(str(item.device), 0) + item.nbytes
    plan = make_plan(checkpoint, targets, chosen, staging_bytes, unused=unused, other_bytes=other)
    reasons = {item.name: item.decision.reason for item in planned}
    placements = tuple(dataclasses.replace(p, reason=reasons[p.name]) for p in plan.placements)
    plan = dataclasses.replace(plan, recipe=recipe, placements=placements)
    infos = checkpoint.tensors
    ordered = sorted(sources, key=lambda name: (infos[name].shard, infos[name].offset))
    return Recording(plan, checkpoint, load, online, tuple(ordered))


def _online(
    inventory: Inventory, records: Mapping[str, _Record], changed: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """Parameters that the loader itself has to load, with reasons, and all the tensors that it needs for them."""
    online: dict[str, str] = {}
    for item in inventory.items:
        found = records.get(item.name)
        if found is None:
            continue
        if found.breaks is not None:
            online[item.name] = found.breaks
        elif item.padding:
            online[item.name] = "it has padding"
        elif names := found.sources & changed.keys():
            online[item.name] = f"{changed[min(names)]} ({min(names)})"
    while True:
        sources = {name for parameter in online for name in records[parameter].sources}
        more = {
            parameter: f"it shares {min(found.sources & sources)} with a parameter that is loaded online"
            for parameter, found in records.items()
            if parameter not in online and found.sources & sources
        }
        if not more:
            return online, sources
        online.update(more)
