"""Boxes of items, taken in: claimed, quantized as they come or kept in high precision, until their layer is complete.

A layer is complete when boxes tile all of its items, never by a count. It is finished before anything else happens to
the model: at the next pair that the loader takes, at the next write to another layer, or at the end; so a loader may
change in place what it has just written. For the same reason a write that goes straight into FP8 is held until its pair
is used up. Without pairs (a function that brings its own tensors) it is quantized at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..elements.boxes import Box
from ..elements.operations import offset_of, undisturbed
from ..elements.pieces import Piece
from ..errors import CoverageError, LoaderError
from ..numerics import schemes
from ..planning.placement import Placement
from ..streaming.sinks import Storage
from ..text import shown
from .coded import Coded
from .finish import Finisher
from .held import Held, Write
from .parameters import Item, Layer
from .quantize.storage import QuantizedStorage
from .report import Ledger
from .watch.origins import Origin


class Intake:
    """Takes boxes in, wherever they come from, and has complete layers finished.

    Args:
        duplicates: "error", or "update" to let a later tensor win where two fill one box.
        updating: layers are finished already, and get new values.
        advice: what to do about such tensors.
    """

    def __init__(
        self,
        held: Held,
        finish: Finisher,
        ledger: Ledger,
        *,
        duplicates: str = "error",
        updating: bool = False,
        advice: str = "With duplicates='update' the later one wins.",
    ) -> None:
        self.held, self.quantizer, self.finish, self.ledger = held, held.quantizer, finish, ledger
        self._duplicates, self._updating, self._advice = duplicates, updating, advice
        self._pending: list[Layer] = []  # complete, and about to be finished
        self._wrote: dict[int, Item] = {}  # items that the pair has written to
        self.closed = False  # the load or update is over

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def take(self, name: str, tensor: Tensor) -> None:
        """A pair is about to be written."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise LoaderError(f"{name}: dense torch tensors are taken, and this one is {shown(str(kind))}. Convert it.")
        self.ledger.taken_bytes += tensor.nbytes

    def settle(self) -> None:
        """Wait until no value that was taken in is needed any more."""
        self.quantizer.settle()

    def quiet(self) -> AbstractContextManager[None]:
        """What happens within is not the loader's doing; here, nobody looks."""
        return contextlib.nullcontext()

    @property
    def waits(self) -> bool:
        """True if something is to be done when the pair is used up."""
        return bool(self.held.writes or self._pending or self.held.staged)

    def turn(self) -> None:
        """The pair is used up."""
        self.held.flush()
        self._finish_pending()
        wrote, self._wrote = self._wrote, {}
        for key, item in wrote.items():  # nothing has come for the others
            if key in self.held.staged:
                with undisturbed():
                    self.held.press_rest(item, each_matrix=True)

    def turn_to(self, item: Item, origin: Origin) -> None:
        """Values of an item are about to come: what came before is over, unless it has the same origin and layer."""
        held = self.held.writes
        if held and (held[-1].origin.number != origin.number or held[-1].item.layers != item.layers):
            self.held.flush()
        if self._pending and not all(layer in item.layers for layer in self._pending):
            self.held.flush()
            self._finish_pending(but=item.layers)

    def reopen(self, layer: Layer) -> None:
        """A complete layer got another parameter."""
        if layer in self._pending and not layer.is_complete():
            self._pending.remove(layer)

    def _finish_pending(self, but: Sequence[Layer] = ()) -> None:
        for layer in [layer for layer in self._pending if layer not in but]:
            self._pending.remove(layer)
            self.finish(layer)

    def give_up(self) -> None:
        """An error has come: of what waits, quantize as much as can be."""
        with contextlib.suppress(RuntimeError):  # the error that we have comes first
            self.quantizer.press()

    def rest(self) -> None:
        """Nothing comes for a while: give back all memory but that of boxes that wait for others."""
        self.quantizer.close()

    def close(self) -> None:
        """Drop what was not carried out, and give back all memory."""
        self.closed = True
        self.held.forget()
        self._pending, self._wrote = [], {}
        self.quantizer.close()

    # -- boxes --------------------------------------------------------------------------------------------------------

    def put(
        self, item: Item, pieces: Sequence[Piece], values: Tensor, origin: Origin, coded: Coded | None = None
    ) -> None:
        """Boxes of an item, and where ``values``, which nobody changes in place, holds theirs: offsets count from its
        first element.

        Args:
            coded: what the values were decoded from; where its numbers and scales can stay, they do.
        """
        self.turn_to(item, origin)
        label, begin = origin.label, offset_of(values)
        pieces = [Piece(p.dst_off, p.size, label, begin + p.src_off, p.src_strides) for p in pieces]
        boxes = [piece.box for piece in pieces]
        self.claim(item, boxes, origin)
        if self.held.goes_straight(item, pieces, values):
            if coded is None or not self.held.passes(item, pieces, coded):
                self.held.press_at_once(Write(item, pieces, values, origin))
        else:
            self.held.stage(Write(item, pieces, values, origin))
        self.wrote(item, boxes, origin, pieces)

    def write(self, write: Write, *, pair: bool, stays: bool) -> None:
        """Boxes of an item, as a loader writes them.

        Args:
            pair: values are those of a pair, or made of it, and may change until that is used up.
            stays: they can be read later.
        """
        item = write.item
        boxes = [piece.box for piece in write.pieces]
        self.claim(item, boxes, write.origin)
        if not stays or not self.held.goes_straight(item, write.pieces, write.values):
            self.held.stage(write)
        else:
            self.held.hold(write)
            if not pair:
                self.held.flush()  # nobody says when the tensor may change
                self.settle()
        self.wrote(item, boxes, write.origin, write.pieces)

    def claim(self, item: Item, boxes: Sequence[Box], origin: Origin) -> None:
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
                f"finished. Two tensors for one box are an error. {self._advice}"
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
                    f"{item.name}{again} is written twice: by {first}, and by {origin.name}. {self._advice}"
                )
            else:
                self.held.flush()
                self.held.rewrite(item, box)

    def wrote(self, item: Item, boxes: Sequence[Box], origin: Origin, pieces: Sequence[Piece] = ()) -> None:
        """Boxes that were claimed have their values, or are held."""
        item.wrote(boxes, pieces)
        self._wrote[id(item)] = item
        for box in boxes:
            self.ledger.event(item.event("write", box, origin.name))
        for layer in item.layers:
            if not layer.finished and layer not in self._pending and layer.is_complete():
                self._pending.append(layer)

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
