"""Writes of a loader, as boxes of items: which elements it writes, and whose values those are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..elements.boxes import Box
from ..elements.operations import Operation, offset_of
from ..elements.pieces import Piece
from ..elements.views import trace_view
from ..errors import LoaderError
from .finish import Finisher
from .held import Held, Write, holds_weights, stored
from .intake import Intake
from .inventory import Inventory
from .parameters import Item
from .report import Ledger
from .watch.codes import Codes, is_number
from .watch.generated import Generated
from .watch.modes import Mark
from .watch.origins import Origin, Origins
from .watch.unfilled import Unfilled


class Writes(Intake):
    """Takes in what a loader does: the `octavo.session.watch.modes.Receiver` of a session."""

    def __init__(
        self, inventory: Inventory, held: Held, finish: Finisher, ledger: Ledger, *, duplicates: str, updating: bool
    ) -> None:
        super().__init__(held, finish, ledger, duplicates=duplicates, updating=updating)
        self.inventory, self.origins, self.unfilled, self.generated = inventory, Origins(), Unfilled(), Generated()
        self.codes = Codes()
        self.paused = False
        self.failure: BaseException | None = None  # the first; a loader that goes on after it does not load the model

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def take(self, name: str, tensor: Tensor) -> None:
        super().take(name, tensor)
        self.unfilled.forget(tensor)
        self.generated.forget(tensor)
        self.codes.take(name, tensor)
        self.origins.take(name, tensor)

    def turn(self) -> None:
        if self.waits:
            with self.quiet():
                super().turn()
        self.origins.current = None

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Operations within pass, as those of a provider."""
        before, self.paused = self.paused, True
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise
        finally:
            self.paused = before

    # -- what loaders do ----------------------------------------------------------------------------------------------

    def copy(self, item: Item, view: Tensor, values: Tensor) -> None:
        if not view.numel():  # a rank's share of what it has none of: nothing is written, whenever it comes
            return
        if values.is_meta:
            raise LoaderError(f"{item.name}: a loader copies a tensor that is on meta, and has no values")
        if item.scheme and holds_weights(view) and values.ndim and not holds_weights(values):
            _refuse_codes(item, values.dtype)
        self.refuse_codes(item, (values,))
        if self.generated.holds(values) and not self._updating:
            real = self.generate(item, view)
            with self.quiet():
                real.copy_(values)
            return
        with self.quiet():
            if self.unfilled.gaps(values):
                raise LoaderError(
                    f"{item.name}: a loader copies memory to it that nothing was written to. Fill it first."
                )
            view = item.on_twin(view) if item.virtual else view
            for place, taken, origin in self.origins.split(view, values):
                self.turn_to(item, origin)
                taken = taken.expand(place.shape)
                pieces = _trace(item, place, taken.stride(), offset_of(taken), origin.label)
                self._write(Write(item, pieces, taken, origin, place))

    def refuse_codes(self, item: Item, inputs: Iterable[Tensor]) -> None:
        """Raise where all that an item's values are made of still lacks its scales."""
        if item.dtype.is_floating_point and item.dtype.itemsize > 1:
            found = [self.codes.dtype_of(tensor) for tensor in inputs if is_number(tensor)]
            coded = [dtype for dtype in found if dtype is not None]
            if coded and len(coded) == len(found):
                with self.quiet():
                    _refuse_codes(item, coded[0])

    def copy_final(self, item: Item, final: Tensor, view: Tensor, values: Tensor) -> None:
        storage = item.quantized
        if storage is None or final is not storage.weight or storage.scheme.packed:
            self.touch_final(item)
            return
        with self.quiet():
            origin, values = self.origins.of(values), values.expand(view.shape)
            shape, offset = item.stored_shape, offset_of(view) - offset_of(final)
            try:
                pieces = trace_view(
                    shape, final.stride(), offset, view.shape, view.stride(), values.stride(), offset_of(values)
                )
            except ValueError as error:
                raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error
            # two axes that change places, or none
            pieces = [item.as_stored(piece)._replace(src_name=origin.label) for piece in pieces]
            self.turn_to(item, origin)
            self._write(Write(item, pieces, values, origin))

    def _write(self, write: Write) -> None:
        pair = self.origins.current is not None
        # nobody sees when memory changes that others than torch can reach: it can't be read later
        self.write(write, pair=pair, stays=not pair or self.origins.is_seen(write.values))

    def touch_final(self, item: Item) -> None:
        with self.quiet():
            raise LoaderError(
                f"{item.name}: a loader reads or changes it when its layer is finished, and would deal in codes "
                "without their scale. Keep the weight out of the recipe, or let the loader do so before the next tensor."  # noqa: E501
            )

    def fill(self, item: Item, view: Tensor, run: Callable[[Tensor], Any]) -> None:
        # no second tensor hides in one value for all
        run(self._generated(item, view, self.origins.of(None)._replace(sure=True)))

    def generate(self, item: Item, view: Tensor) -> Tensor:
        return self._generated(item, view, self.origins.of(None))

    def _generated(self, item: Item, view: Tensor, origin: Origin) -> Tensor:
        """Values that are no tensor's: they are how loaders begin, not what they load; for a part, they are padding."""
        with self.quiet():
            self.turn_to(item, origin)
            boxes = _boxes(item, view)
            if item.writes or sum(box.numel for box in boxes) < item.numel:
                self.claim(item, boxes, origin)
                item.generated = True
                self.wrote(item, boxes, origin)
            return self.held.real(item, view)

    def scatter(
        self, item: Item, view: Tensor, values: Tensor | None, run: Callable[[Tensor], Any], mark: Mark
    ) -> None:
        self.refuse_codes(item, () if values is None else (values,))
        with self.quiet():
            mask = torch.zeros(view.shape, dtype=torch.int32, device="cpu")
            labels, origins = self._labels(values)
            mark(mask, labels)
            marked = [(origin, _marked(item, view, mask == n)) for n, origin in enumerate(origins, 1)]
            for origin, boxes in marked:
                self.turn_to(item, origin)
                self.claim(item, boxes, origin)
            run(self.held.real(item, view))
            item.generated |= values is None
            for origin, boxes in marked:
                self.wrote(item, boxes, origin, [_computed(b, origin) for b in boxes if values is not None])

    def _labels(self, values: Tensor | None) -> tuple[Tensor, list[Origin]]:
        """The origins of values, and a number for each element that tells which, or one for all."""
        one = torch.ones((), dtype=torch.int32, device="cpu")
        if values is None:
            return one, [self.origins.of(None)._replace(sure=True)]  # no second tensor hides in one value for all
        if not values.ndim:
            return one, [self.origins.of(values)]
        labels = torch.ones(values.shape, dtype=torch.int32, device="cpu")
        parts = self.origins.split(labels, values)
        origins = list(dict.fromkeys(part.origin for part in parts))
        for part in parts:
            part.place.fill_(1 + origins.index(part.origin))
        return labels, origins

    def overwrite(self, item: Item, view: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        self.refuse_codes(item, inputs)
        with self.quiet():
            origin = self.origins.of_any(inputs)
            self.turn_to(item, origin)
            boxes = _boxes(item, view)
            self.claim(item, boxes, origin)
            real = self.held.real(item, view)
            self.wrote(item, boxes, origin, [_computed(box, origin) for box in boxes])
            return real

    def change(self, item: Item, view: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        real = self.access(item, view)
        if item.generated:  # anything else may be the scale
            self.refuse_codes(item, inputs)
        if (item.scheme or item.generated) and inputs:  # what begins as zeros, and gets values by being added to
            with self.quiet():
                origin = self.origins.of_any(inputs)
                rest = _boxes(item, view)
                for piece in item.writes:
                    rest = [part for box in rest for part in box.without(piece.box)]
                item.wrote((), [_computed(box, origin) for box in rest])
        return real

    def access(self, item: Item, view: Tensor) -> Tensor:
        if not item.virtual:
            return view
        with self.quiet():
            if item.settled and not item.scheme and item.real is None:
                raise LoaderError(f"{item.name}: a loader comes back to it when its layer is finished")
            whole_is_filled = item.real is not None and item.untouched
            for box in _boxes(item, view):
                if any(box.common(gap) for gap in item.gaps.boxes) and not whole_is_filled:
                    raise LoaderError(f"{item.name}{box}: a loader reads it before it is written")
                if item.quantized is not None and any(stored(item, box).common(done) for done in item.pressed):
                    raise LoaderError(
                        f"{item.name}{box}: a loader reads or changes what is quantized already. With direct=False a "
                        "layer stays in high precision until it is complete."
                    )
            return self.held.real(item, view)

    def derived(self, items: Iterable[Item], others: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        blank = not self._updating and all(item.virtual and not item.writes for item in items)
        if blank and all(map(self.generated.holds, others)):
            self.generated.add(made)
            return
        for tensor in made:
            self.generated.forget(tensor)

    def device_of(self, item: Item) -> torch.device:
        return item.device

    def mutated(self, tensor: Tensor) -> None:
        self.settle()
        if self.held.reads_later(tensor):
            with self.quiet():
                self.held.flush()
                self.settle()

    def computed(self, done: Operation) -> None:
        with self.quiet():
            self.origins.computed(done)
            self.generated.computed(done)
            self.codes.computed(done)
            self.unfilled.computed(done)

    def escaped(self, tensor: Tensor) -> None:
        self.mutated(tensor)
        self.origins.expose(tensor)
        self.unfilled.forget(tensor)
        self.generated.forget(tensor)
        item = self.inventory.find(tensor)
        if item is not None and not item.virtual:
            item.expect([])  # whoever writes there does not tell


def _refuse_codes(item: Item, dtype: torch.dtype) -> NoReturn:
    raise LoaderError(
        f"{item.name}: a loader copies {dtypes.short(dtype)} to it, whose numbers mean nothing without "
        "their scales. Give the session bf16, fp16 or fp32: octavo.stream(path, None) hands out what a quantized "
        "checkpoint stands for; a transform may dequantize."
    )


def _trace(item: Item, view: Tensor, values: tuple[int, ...], begin: int = 0, label: str = "") -> list[Piece]:
    """A view of an item as boxes of it, and where values of these strides hold theirs."""
    try:
        return trace_view(item.shape, item.strides, *item.elements(view), values, begin, label)
    except ValueError as error:
        raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error


def _boxes(item: Item, view: Tensor) -> list[Box]:
    return [piece.box for piece in _trace(item, view, (0,) * view.ndim)]


def _marked(item: Item, view: Tensor, mask: Tensor) -> list[Box]:
    """The boxes of the marked elements: whole rows of the view, or one element each."""
    boxes = []
    view = item.on_twin(view) if item.virtual else view
    for row in range(mask.shape[0]):
        if bool(mask[row].all()):
            boxes += _boxes(item, view[row])
        else:
            boxes += [b for at in mask[row].nonzero().tolist() for b in _boxes(item, view[(row, *at)])]
    return boxes


def _computed(box: Box, origin: Origin) -> Piece:
    """A box whose values come from an origin, and not as they lie there."""
    return Piece(*box, origin.label, 0, (0,) * len(box.off))
