"""What becomes of each write of a loader: a box of an item, quantized as it comes or kept until its layer is complete.

A layer is complete when boxes tile all of its items, never by a count. It is finished before anything else happens to
the model: at the next pair that the loader takes, at the next write to another layer, or at the end; so a loader may
change in place what it has just written. For the same reason a write that goes straight into FP8 is held until its pair
is used up. Without pairs (a function that brings its own tensors) it is quantized at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import dtypes
from ..elements.boxes import Box
from ..elements.operations import Operation, offset_of, undisturbed
from ..elements.pieces import Piece
from ..elements.views import NoBoxError, trace_view
from ..errors import CoverageError, LoaderError
from ..numerics import schemes
from ..planning.placement import Placement
from ..streaming.sinks import Storage
from .finish import Finisher
from .held import Held, Write, holds_weights, stored
from .inventory import Inventory
from .parameters import Item, Layer
from .quantize.storage import QuantizedStorage, values_of
from .report import Ledger
from .watch.modes import Mark
from .watch.origins import Origin, Origins
from .watch.unfilled import Unfilled


class Intake:
    """The `octavo.session.watch.modes.Receiver` of a session."""

    def __init__(
        self,
        inventory: Inventory,
        held: Held,
        finish: Finisher,
        ledger: Ledger,
        *,
        duplicates: str,
        updating: bool,
    ) -> None:
        self.inventory, self.held, self.quantizer, self.ledger = inventory, held, held.quantizer, ledger
        self.origins, self.unfilled = Origins(), Unfilled()
        self.paused = False
        self.failure: BaseException | None = None  # the first; a loader that goes on after it does not load the model
        self.finish = finish
        self._duplicates, self._updating = duplicates, updating
        self._pending: list[Layer] = []  # complete, and about to be finished

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def take(self, name: str, tensor: Tensor) -> None:
        """The loader is given a pair."""
        self.unfilled.forget(tensor)
        self.ledger.taken_bytes += tensor.nbytes
        self.origins.take(name, tensor)

    def turn(self) -> None:
        """The loader is done with its pair."""
        if self.held.writes or self._pending or self.held.staged:
            with self.quiet():
                self.held.flush()
                self._finish_pending()
                for item in list(self.held.staged.values()):
                    with undisturbed():
                        self.held.press_rest(item, each_matrix=True)
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

    def forget(self) -> None:
        """Drop what was not carried out."""
        self.held.forget()
        self._pending = []
        self.origins.clear()

    # -- what loaders do ----------------------------------------------------------------------------------------------

    def copy(self, item: Item, view: Tensor, values: Tensor) -> None:
        if not view.numel():  # a rank's share of what it has none of: nothing is written, whenever it comes
            return
        if values.is_meta:
            raise LoaderError(f"{item.name}: a loader copies a tensor that is on meta, and has no values")
        if item.scheme and holds_weights(view) and values.ndim and not holds_weights(values):
            raise LoaderError(
                f"{item.name}: a loader copies {dtypes.short(values.dtype)} to it, whose numbers mean nothing without "
                "their scales. Give the session bf16, fp16 or fp32; a transform may dequantize."
            )
        with self.quiet():
            if self.unfilled.gaps(values):
                raise LoaderError(
                    f"{item.name}: a loader copies memory to it that nothing was written to. Fill it first."
                )
            view = item.on_twin(view) if item.virtual else view
            for place, taken, origin in self.origins.split(view, values):
                self._turn_to(item, origin)
                taken = taken.expand(place.shape)
                self._put(item, self._trace(item, place, origin, taken), taken, origin, place)

    def copy_final(self, item: Item, final: Tensor, view: Tensor, values: Tensor) -> None:
        storage = item.quantized
        if storage is None or final is not storage.weight:
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
            self._turn_to(item, origin)
            self._put(item, pieces, values, origin, None)

    def touch_final(self, item: Item) -> None:
        with self.quiet():
            raise LoaderError(
                f"{item.name}: a loader reads or changes it when its layer is finished, and would deal in FP8 numbers "
                "without their scale. Keep the weight out of the recipe, or let the loader do so before the next tensor."  # noqa: E501
            )

    def put(self, item: Item, pieces: Sequence[Piece], values: Tensor) -> None:
        """Boxes of an item, and where ``values``, which nobody changes in place, holds theirs: offsets count from its
        first element."""
        origin, begin = self.origins.of(values), offset_of(values)
        self._turn_to(item, origin)
        label = origin.label
        pieces = [Piece(p.dst_off, p.size, label, begin + p.src_off, p.src_strides) for p in pieces]
        if id(item) in self.held.staged or not self.held.goes_straight(item, pieces, values):
            self._put(item, pieces, values, origin, None)
            return
        boxes = [piece.box for piece in pieces]
        self._claim(item, boxes, origin)
        for piece, box in zip(pieces, boxes, strict=True):
            event = item.event("quantize", box, origin.name)
            self.held.press(item, item.as_stored(piece), values, event)
            self.ledger.event(event)
        self._wrote(item, boxes, origin, pieces)

    def _put(self, item: Item, pieces: list[Piece], values: Tensor, origin: Origin, view: Tensor | None) -> None:
        boxes = [piece.box for piece in pieces]
        self._claim(item, boxes, origin)
        # nobody sees when memory changes that others than torch can reach: it can't be read later
        stays = self.origins.current is None or self.origins.is_seen(values)
        if stays and self.held.goes_straight(item, pieces, values):
            self.held.hold(Write(item, pieces, values, origin, view))
            if self.origins.current is None:
                self.held.flush()  # nobody says when the tensor may change
                self.quantizer.settle()
        elif view is None:
            self.held.unhold(item)
            real = self.held.materialize(item)
            for piece in pieces:
                piece.region(real).copy_(values_of(piece, values))
        else:
            self.held.real(item, view).copy_(values)
        self._wrote(item, boxes, origin, pieces)

    def fill(self, item: Item, view: Tensor, run: Callable[[Tensor], Any]) -> None:
        origin = self.origins.of(None)._replace(sure=True)  # no second tensor hides in one value for all
        with self.quiet():
            self._turn_to(item, origin)
            boxes = self._boxes(item, view)
            # one value for all is how loaders begin, not what they load; for a part, it is padding
            if item.writes or sum(box.numel for box in boxes) < item.numel:
                self._claim(item, boxes, origin)
                self._wrote(item, boxes, origin)
            run(self.held.real(item, view))

    def scatter(
        self, item: Item, view: Tensor, values: Tensor | None, run: Callable[[Tensor], Any], mark: Mark
    ) -> None:
        with self.quiet():
            mask = torch.zeros(view.shape, dtype=torch.int32, device="cpu")
            labels, origins = self._labels(values)
            mark(mask, labels)
            marked = [(origin, self._marked(item, view, mask == n)) for n, origin in enumerate(origins, 1)]
            for origin, boxes in marked:
                self._turn_to(item, origin)
                self._claim(item, boxes, origin)
            run(self.held.real(item, view))
            for origin, boxes in marked:
                self._wrote(item, boxes, origin, [Piece(*box, origin.label, 0, (0,) * len(box.off)) for box in boxes])

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
        with self.quiet():
            origin = self.origins.of_any(inputs)
            self._turn_to(item, origin)
            boxes = self._boxes(item, view)
            self._claim(item, boxes, origin)
            real = self.held.real(item, view)
            self._wrote(item, boxes, origin, [Piece(*box, origin.label, 0, (0,) * len(box.off)) for box in boxes])
            return real

    def change(self, item: Item, view: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        real = self.access(item, view)
        if item.scheme and inputs:  # what begins as zeros, and gets values by being added to
            with self.quiet():
                origin = self.origins.of_any(inputs)
                rest = self._boxes(item, view)
                for piece in item.writes:
                    rest = [part for box in rest for part in box.without(piece.box)]
                item.wrote((), [Piece(*box, origin.label, 0, (0,) * len(box.off)) for box in rest])
        return real

    def access(self, item: Item, view: Tensor) -> Tensor:
        if not item.virtual:
            return view
        with self.quiet():
            if item.settled and not item.scheme and item.real is None:
                raise LoaderError(f"{item.name}: a loader comes back to it when its layer is finished")
            whole_is_filled = item.real is not None and item.untouched
            for box in self._boxes(item, view):
                if any(box.common(gap) for gap in item.gaps.boxes) and not whole_is_filled:
                    raise LoaderError(f"{item.name}{box}: a loader reads it before it is written")
                if item.quantized is not None and any(stored(item, box).common(done) for done in item.pressed):
                    raise LoaderError(
                        f"{item.name}{box}: a loader reads or changes what is quantized already. With direct=False a "
                        "layer stays in high precision until it is complete."
                    )
            return self.held.real(item, view)

    def device_of(self, item: Item) -> torch.device:
        return item.device

    def mutated(self, tensor: Tensor) -> None:
        self.quantizer.settle()
        if self.held.reads_later(tensor):
            with self.quiet():
                self.held.flush()
                self.quantizer.settle()

    def computed(self, done: Operation) -> None:
        with self.quiet():
            self.origins.computed(done)
            self.unfilled.computed(done)

    def escaped(self, tensor: Tensor) -> None:
        self.mutated(tensor)
        self.origins.expose(tensor)
        self.unfilled.forget(tensor)
        item = self.inventory.find(tensor)
        if item is not None and not item.virtual:
            item.expect([])  # whoever writes there does not tell

    # -- boxes --------------------------------------------------------------------------------------------------------

    def _trace(self, item: Item, view: Tensor, origin: Origin, values: Tensor) -> list[Piece]:
        try:
            offset, sizes, strides = item.elements(view)
            if sizes != list(values.shape):
                raise NoBoxError(f"bits are written as {view.dtype}")
            return trace_view(
                item.shape, item.strides, offset, sizes, strides, values.stride(), offset_of(values), origin.label
            )
        except ValueError as error:
            raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error

    def _boxes(self, item: Item, view: Tensor) -> list[Box]:
        try:
            offset, sizes, strides = item.elements(view)
            return [p.box for p in trace_view(item.shape, item.strides, offset, sizes, strides, (0,) * len(sizes))]
        except ValueError as error:
            raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error

    def _marked(self, item: Item, view: Tensor, mask: Tensor) -> list[Box]:
        """The boxes of the marked elements: whole rows of the view, or one element each."""
        boxes = []
        view = item.on_twin(view) if item.virtual else view
        for row in range(mask.shape[0]):
            if bool(mask[row].all()):
                boxes += self._boxes(item, view[row])
            else:
                boxes += [b for at in mask[row].nonzero().tolist() for b in self._boxes(item, view[(row, *at)])]
        return boxes

    def _claim(self, item: Item, boxes: Sequence[Box], origin: Origin) -> None:
        """A box may be written once, or again by the pair that wrote it: what counts is the result."""
        if origin.mixed and item.scheme and schemes.get(item.scheme).group_rows != 1:
            raise LoaderError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: a loader has made its values of {origin.name}, in a way "
                f"in which nobody can tell whose they are; of rows that come from different tensors {item.scheme} has "
                "scales of their own. Copy each tensor by itself, or choose a scheme whose groups lie within rows."
            )
        loose = item.is_buffer and not item.required  # a table that the loader may fill as it likes
        if item.settled and not self._updating and self._duplicates == "error" and not loose:
            raise CoverageError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: {origin.name} comes when the layer is complete and "
                "finished. Two tensors for one box are an error; with duplicates='update' the later one wins."
            )
        if item.provided:
            raise LoaderError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: {origin.name} comes when a function of yours has finished "
                "the layer: only it knows what it made of it. Drop the earlier tensor in a transform."
            )
        for box in () if loose else boxes:
            again = item.gaps.written(box)
            if again is None:
                continue
            writers = {piece.src_name for piece in item.writes if again.common(piece.box)}
            if origin.sure and writers <= {origin.label} and (self._updating or not item.settled):
                self.held.unhold(item)
                self.held.rewrite(item, box)
            elif self._duplicates == "error":
                first = ", ".join(sorted(name.rpartition("#")[0] for name in writers)) or "padding"
                raise CoverageError(
                    f"{item.name}{again} is written twice: by {first}, and by {origin.name}. With duplicates='update' "
                    "the later one wins."
                )
            else:
                self.held.flush()
                self.held.rewrite(item, box)

    def _wrote(self, item: Item, boxes: Sequence[Box], origin: Origin, pieces: Sequence[Piece] = ()) -> None:
        item.wrote(boxes, pieces)
        for box in boxes:
            self.ledger.event(item.event("write", box, origin.name))
        for layer in item.layers:
            if not layer.finished and layer not in self._pending and layer.is_complete():
                self._pending.append(layer)

    # -- where values go ----------------------------------------------------------------------------------------------

    def _turn_to(self, item: Item, origin: Origin) -> None:
        """What went before is over, unless it concerns the same origin and layer."""
        if self.held.writes and (
            self.held.writes[-1].origin.number != origin.number or self.held.writes[-1].item.layers != item.layers
        ):
            self.held.flush()
        if self._pending and not all(layer in item.layers for layer in self._pending):
            self.held.flush()
            self._finish_pending(but=item.layers)

    def _finish_pending(self, but: Sequence[Layer] = ()) -> None:
        for layer in [layer for layer in self._pending if layer not in but]:
            self._pending.remove(layer)
            self.finish(layer)

    def settle_streamed(self, item: Item, placement: Placement, storage: Storage) -> None:
        """A stream has filled an item's final storage; a layer of which that was the last is finished."""
        if placement.scheme:
            scheme = schemes.get(placement.scheme)
            item.adopt(QuantizedStorage(item.name, storage.weight, scheme, placement.parts, storage.scale))
        else:
            item.adopt(storage.weight)
        for layer in item.layers:
            if layer.is_complete() and not layer.finished:
                self.finish(layer)

    def reopen(self, layer: Layer) -> None:
        """A complete layer got another parameter."""
        if layer in self._pending and not layer.is_complete():
            self._pending.remove(layer)
