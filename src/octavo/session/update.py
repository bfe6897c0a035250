"""New weights for a model that octavo loaded, in place: from a trainer's iterator, whole or partial, in any order.

Names are those of the checkpoint that the model was loaded from, which the load has left behind as `Routes`, or the
model's own. Each tensor is requantized into the storage that exists, to the bytes that loading it would have given.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import dtypes
from ..checkpoint.companions import of_weight
from ..checkpoint.names import is_adapters, plain_names, trained
from ..elements.operations import storage_key
from ..elements.pieces import Piece, contiguous_strides
from ..errors import CoverageError, LoaderError
from ..numerics import schemes
from ..numerics.groups import Groups
from ..planning.budget import check_options
from ..planning.recipe import Decision
from ..planning.routes import Routes
from ..running import modules
from ..text import human_bytes
from .claims import claimed
from .coded import TAKEN, Came, Coded, Waiting
from .finish import Finisher
from .held import Held
from .intake import Intake
from .inventory import Inventory
from .pairs import Pair, Pairs, Transform
from .parameters import Item
from .quantize.quantizer import Quantizer
from .quantize.storage import QuantizedStorage
from .report import LayerwiseReport, Ledger
from .updating import updating
from .watch.origins import Origin

#: what to say of a box that comes twice
_ONCE = "In an update each comes once, and calls with more=True are one update, up to one without it or one that fails."
#: of tied parameters, a part at a time
_COMPARED_BYTES = 16 << 20
#: the attribute of a model in which an `Update` waits for its next call
_BEGUN = "_octavo_update"
#: that in which a load leaves `Routes`, or None where all names are the model's own
_ROUTES = "load_routes"


#: where tensors go by names that checkpoints of a model's architecture have, and the model has not
Usual = Callable[[nn.Module], Routes | None]


def update_model(
    model: Any,
    pairs: Iterable[Pair] | Mapping[str, Tensor],
    transform: Transform | None,
    staging_bytes: int,
    more: bool = False,
    usual: Usual | None = None,
) -> LayerwiseReport:
    """`octavo.update`, where arguments and errors are documented.

    Args:
        usual: tells of names that neither the model nor its checkpoint had, if any come.
    """
    if not isinstance(model, nn.Module) or next(modules.quantized_weights(model), None) is None:
        raise LoaderError("octavo.update is for a model with weights that octavo quantized: load it with octavo.load")
    if not isinstance(pairs, Iterable) or isinstance(pairs, (bytes, bytearray, Tensor)):
        raise LoaderError(
            "octavo.update takes pairs of names and tensors, a mapping, or the path of a checkpoint, not "
            f"{type(pairs).__name__}"
        )
    if lent := next((name for name, parameter in model.named_parameters() if parameter.is_meta), None):
        raise LoaderError(
            f"{lent} has no memory of its own: accelerate keeps it on the CPU or on disk, and lends it. To be updated, "
            "a model needs a device_map without these"
        )
    check_options(staging_bytes)
    with _young_garbage_only():
        # what it knows stays with the model until the update is over, and is no part of a copy of it
        begun: Update | None = model.__dict__.pop(_BEGUN, None)
        update = begun or Update(model, usual)
        report = update.take(pairs, transform, staging_bytes, more)
        if more:
            model.__dict__[_BEGUN] = update
        return report


class Update:
    """An update of a model, which may take several calls: what has come, and what waits for its other half."""

    def __init__(self, model: nn.Module, usual: Usual | None = None) -> None:
        within, routes = _routes_of(model)
        self._inventory, self._report, self._ledger = _quantized(model), LayerwiseReport(), Ledger()
        self._quantizer, self._waiting = Quantizer(0), Waiting(0)
        self._held = Held(self._quantizer, self._ledger, cast=False)
        finish = Finisher(self._inventory, self._held, self._ledger, self._report)
        self._intake = Intake(self._held, finish, self._ledger, updating=True, advice=_ONCE)
        self._items = _by_all_names(self._inventory, within)
        self._names = Names(model, self._items, routes, model.get_submodule(within), usual, within)
        self._written: dict[str, str] = {}  # tied parameters, by the item's name -> the name by which they came
        self._came = 0
        self._places = _places(model)

    def __reduce__(self) -> Any:
        """A copy of the model, or a file of it, has no update that waits."""
        return type(None), ()

    def take(
        self, pairs: Iterable[Pair] | Mapping[str, Tensor], transform: Transform | None, staging_bytes: int, more: bool
    ) -> LayerwiseReport:
        """One call; the last, unless there is ``more``."""
        model, intake, quantizer, waiting = self._inventory.model, self._intake, self._quantizer, self._waiting
        if self._places != _places(model):
            raise LoaderError(
                "the model was changed between two calls of one update (it was moved, cast or loaded). Run the whole "
                "update again"
            )
        quantizer.staging_bytes = waiting.limit_bytes = staging_bytes
        mine = {storage_key(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
        with claimed(self._inventory), updating(self._inventory, intake, self._report, more=more):
            source = Pairs(intake, pairs.items() if isinstance(pairs, Mapping) else pairs, transform)
            named = ((self._names.of(name), tensor) for name, tensor in source)
            own, check = self._names, _refuse_without_values
            for came in waiting.joined(named, own, self._is_whole, check, lambda: not source.at_rest):
                quantizer.values_stay = source.at_rest
                self._put(came, mine)
            if more:
                waiting.keep()
                _refuse_much(self._held.staged.values(), staging_bytes)
            else:
                waiting.check()
        self._report.waiting = [*waiting.names, *(item.name for item in self._held.staged.values())]
        return self._report

    def _is_whole(self, name: str, tensor: Tensor) -> bool:
        """Return True for what the model itself holds in such numbers, without scales."""
        item = self._items.get(name)
        return item is not None and not item.scheme and item.dtype == tensor.dtype

    def _put(self, came: Came, own: Container[int | None]) -> None:
        routes, items = self._names.routes, self._items
        name, tensor = came.name, came.tensor.resolve_neg()  # which may say that its numbers are to be negated
        tensor = tensor if came.scale is None else tensor.contiguous()
        self._came += 1
        if routes is not None and name in routes.unused:
            return
        if routes is not None and name in routes.pieces:
            found, values = _along(routes, name, tensor, items), tensor.contiguous()
        elif name not in items:
            near = self._names.near(name)
            raise CoverageError(
                f"{name}: neither the checkpoint nor the model has such a tensor. Rename or drop it.{near}"
            )
        else:
            found, values = [_by_own_name(name, tensor, items)], tensor
        coded = None
        if came.scale is not None:
            coded = Coded.of(came, _likely(name, routes, [items[parameter] for parameter, _ in found]))
            values = coded.decode()
        item = items.get(name)
        if item is not None and len(item.faces) > 1:
            if item.name in self._written and item.real is not None:
                _refuse_difference(self._written[item.name], item.real, name, values)
                return
            self._written[item.name] = name
        for parameter, piece in found:
            _refuse_dtype(items[parameter], name, values)
            self._intake.put(items[parameter], [piece], values, Origin(self._came, name), coded)
        # a copy of it, which nobody else holds; or the model's own, which a later pair may write
        if values is not tensor or storage_key(values) in own:
            self._quantizer.gather()


class Names(Container[str]):
    """Names of tensors that an update may bring: the checkpoint's, and the model's own. It contains those it uses.

    Args:
        home: the model that was loaded, with which routes stay.
        usual: see `Usual`.
        within: the name of that model within this one.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Mapping[str, Item],
        routes: Routes | None,
        home: nn.Module,
        usual: Usual | None,
        within: str = "",
    ) -> None:
        self._outer = f"{within}." if within else ""
        self.routes, self._home, self._usual = routes, home, usual
        self._used = {*items, *(() if routes is None else routes.pieces)}
        self._known = self._used if routes is None else self._used.union(routes.unused)
        self._prefix = f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) else ""

    def __contains__(self, name: object) -> bool:
        return name in self._used

    def of(self, name: str) -> str:
        """A tensor's name here, whatever has wrapped the trainer's model; as it is where none of it is known.

        As in ``from_pretrained``, a model's name for its base model may stand before a name, or be left out.
        """
        if name in self._known:
            return name
        if (found := self._plain(name)) is not None or (self._learn() and (found := self._plain(name)) is not None):
            return found
        if instead := trained(name):
            raise CoverageError(
                f"{name} is what peft keeps of a module that it trains as a whole, and has not been trained. Drop it "
                f"in a transform; what counts is {instead}"
            )
        if is_adapters(name):
            raise CoverageError(
                f"{name} is an adapter's. Merge the adapter into its model before the update (peft: merge_adapter), "
                "and drop its tensors in a transform"
            )
        return name

    def _plain(self, name: str) -> str | None:
        for plain in itertools.chain(plain_names(name), plain_names(name.removeprefix(self._outer))):
            for found in (plain, plain.removeprefix(self._prefix), self._prefix + plain):
                if found in self._known or of_weight(found) in self._known:
                    return found
        return None

    def _learn(self) -> bool:
        """Ask once what other names checkpoints have; True if there are any."""
        usual, self._usual = None if self._usual is None else self._usual(self._home), None
        if usual is None:
            return False
        before = self.routes or Routes({}, {}, {}, {})
        pieces, shapes = {**usual.pieces, **before.pieces}, {**usual.shapes, **before.shapes}
        self.routes = Routes(pieces, shapes, before.unused, before.decodings)
        self._used, self._known = self._used.union(pieces), self._known.union(pieces)
        # asking takes a second where experts are many, and the next update will bring the same names
        vars(self._home)[_ROUTES] = self.routes
        return True

    def near(self, name: str) -> str:
        """What to say of names in the module of an unknown one, or in the nearest one around it."""
        while name := name.rpartition(".")[0]:
            if found := sorted(known for known in self._used if known.startswith(f"{name}.")):
                return f" Near it are {', '.join(found[:2])}{', ...' if len(found) > 2 else ''}"
        return ""


def _places(model: nn.Module) -> dict[str, tuple[int, int]]:
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors}


def _refuse_much(staged: Collection[Item], limit_bytes: int) -> None:
    """Raise where parts of scale groups wait in more high-precision memory than one parameter takes, and the limit."""
    held = sum(item.nbytes for item in staged)
    if len(staged) > 1 and held > limit_bytes:
        names = ", ".join(item.name for item in list(staged)[:3])
        raise CoverageError(
            f"parts of scale groups of {len(staged):,} parameters wait for the others, {human_bytes(held)}, more than "
            f"staging_bytes ({human_bytes(limit_bytes)}): {names}. Let what makes a parameter come together"
        )


def _quantized(model: nn.Module) -> Inventory:
    """The parameters and buffers of a loaded model, those that octavo quantized with their FP8 storage."""
    inventory = Inventory(model)
    quantized = {name: (scheme, parts) for name, scheme, parts in modules.quantized_weights(model)}
    inventory.drop({modules.scale_name(name) for name in quantized})
    for item in inventory.items:
        module, leaf, tensor = item.faces[0]
        if item.name in quantized:
            scheme, parts = quantized[item.name]
            scale = module.get_parameter(modules.scale_name(leaf))
            item.decision = Decision(scheme, "quantized by octavo")
            item.dtype = torch.float32  # which holds whatever comes
            storage = QuantizedStorage(item.name, tensor.data, schemes.get(scheme), parts, scale.data)
            item.adopt(storage)
            if storage.scheme.packed:
                item.shape, item.strides = storage.shape, contiguous_strides(storage.shape)
        else:
            item.required = not item.is_buffer
            item.keep(tensor)
        item.restart()
        item.settle()
    return inventory


@contextlib.contextmanager
def _young_garbage_only() -> Iterator[None]:
    """The cyclic garbage collector looks only at what comes from now on, not at all objects again and again."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


def _refuse_without_values(name: str, tensor: Tensor) -> None:
    """Trainers that shard keep tensors whose memory they gave back, which to read would end the process, or parts."""
    if storage_key(tensor) is None:
        raise LoaderError(
            f"{name} is a {type(tensor).__name__}, and not a plain tensor of all its values; of a DTensor, "
            "transform=lambda name, tensor: (name, tensor.full_tensor()) gathers each when its turn comes"
        )
    if tensor.is_meta or (tensor.numel() and not tensor.untyped_storage().nbytes()):
        found = "is on meta" if tensor.is_meta else "has given its memory back"
        raise LoaderError(f"{name} {found}, and has no values; gather it before the update")


def _refuse_dtype(item: Item, name: str, tensor: Tensor) -> None:
    """Integers and FP8 numbers mean nothing without their scales; what the model itself holds as such may come."""
    wide = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    if not wide and (item.scheme or tensor.dtype != item.dtype):
        raise CoverageError(f"{name} is {dtypes.short(tensor.dtype)}; {TAKEN} {name}_scale_inv or {name}_scale")


def _refuse_difference(written: str, values: Tensor, name: str, tensor: Tensor) -> None:
    """A state dict has a tied parameter under each of its names; ``values`` came under another."""
    rows = max(1, _COMPARED_BYTES // max(1, values[:1].nbytes)) if values.ndim else 1
    parts = (
        zip(torch.split(tensor, rows), torch.split(values, rows), strict=False) if values.ndim else [(tensor, values)]
    )
    if tensor.shape != values.shape or not all(torch.equal(new.to(old), old) for new, old in parts):
        raise CoverageError(
            f"{name} differs from what came as {written} before, and both are one parameter, tied, in the model. Drop "
            "one of them."
        )


def _likely(name: str, routes: Routes | None, items: Sequence[Item]) -> Iterator[Groups]:
    """Groups in which a weight may share scales: those of the checkpoint, then those that the model has."""
    if routes is not None and (before := routes.decodings.get(name)) is not None:
        yield before.group_rows, before.group_cols
    yield from (schemes.get(item.scheme).groups for item in items if item.scheme)


def _routes_of(model: nn.Module) -> tuple[str, Routes | None]:
    """What a load has left behind, also with a model within this one, and the name of that; None if there is none."""
    found = [(name, vars(module)[_ROUTES]) for name, module in model.named_modules() if _ROUTES in vars(module)]
    return found[0] if len(found) == 1 else ("", None)


def _by_all_names(inventory: Inventory, within: str) -> dict[str, Item]:
    """A model's tensors by their names, and by those that they have without wrappers in the model that was loaded."""
    found = inventory.by_name()
    for name, item in list(found.items()):
        for plain in plain_names(name.removeprefix(f"{within}.")):
            found.setdefault(plain, item)
    return found


def _along(routes: Routes, name: str, tensor: Tensor, items: Container[str]) -> Sequence[tuple[str, Piece]]:
    """The boxes that a checkpoint tensor fills."""
    if gone := next((parameter for parameter, _ in routes.pieces[name] if parameter not in items), None):
        raise CoverageError(
            f"{name} goes into {gone}, which the model has lost since it was loaded. Update the model before a part of "
            "it is replaced, or drop the tensor"
        )
    if tuple(tensor.shape) != routes.shapes[name]:
        raise CoverageError(f"{name} is {list(tensor.shape)}; it was {list(routes.shapes[name])} in the checkpoint")
    return routes.pieces[name]


def _by_own_name(name: str, tensor: Tensor, items: Mapping[str, Item]) -> tuple[str, Piece]:
    """All of the model's own parameter ``name``."""
    item = items[name]
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if item.scheme:
        shape, strides = modules.as_stored(item.faces[0].module, item.faces[0].leaf, shape, strides)
    if shape != item.shape:
        raise CoverageError(f"{name} is {list(item.shape)} in the model, {list(tensor.shape)} in the update")
    return name, Piece((0,) * len(shape), shape, name, 0, strides)
