"""What becomes of each write of a loader: a box of an item, quantized as it comes or kept until its layer is complete.

A layer is complete when boxes tile all of its items, never by a count. It is finished before anything else happens to
the model: at the next pair that the loader takes, at the next write to another layer, or at the end; so a loader may
change in place what it has just written. For the same reason a write that goes straight into FP8 is held until its pair
is used up. Without pairs (a function that brings its own tensors) it is quantized at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import dtypes, schemes
from ..errors import CoverageError, LoaderError
from ..pieces import Piece
from ..plan import Placement, cut_parts
from ..sinks import Storage
from .boxes import Box, Gaps, NoBoxError, trace_view
from .items import Inventory, Item, Layer
from .modes import Mark
from .quantizer import Quantizer
from .report import Event, Ledger
from .sources import Source, Sources
from .storage import QuantizedStorage, values_of
from .tensors import offset_of, storage_key, undisturbed
from .unfilled import Unfilled


class _Held(NamedTuple):
    """A write that is to be quantized once its source is used up."""

    item: Item
    pieces: list[Piece]
    values: Tensor
    source: Source
    view: Tensor | None  # where a loader wrote them


class Finisher(Protocol):
    """Gives a complete layer its final form."""

    def __call__(self, layer: Layer) -> None: ...


class Intake:
    """The `octavo.layerwise.modes.Receiver` of a session."""

    def __init__(
        self,
        inventory: Inventory,
        finish: Finisher,
        ledger: Ledger,
        quantizer: Quantizer,
        *,
        direct: bool,
        duplicates: str,
        updating: bool,
    ) -> None:
        self.inventory, self.ledger, self.quantizer = inventory, ledger, quantizer
        self.sources, self.unfilled = Sources(), Unfilled()
        self.paused = False
        self.failure: BaseException | None = None  # the first; a loader that goes on after it does not load the model
        self.finish = finish
        self._direct, self._duplicates, self._updating = direct, duplicates, updating
        self._held: list[_Held] = []
        self._pending: list[Layer] = []  # complete, and about to be finished
        self._staged: dict[int, Item] = {}  # final FP8 storage exists, and high-precision storage for some of its boxes

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def take(self, name: str, tensor: Tensor) -> None:
        """The loader is given a pair."""
        self.unfilled.forget(tensor)
        self.ledger.taken_bytes += tensor.nbytes
        self.sources.take(name, tensor)

    def turn(self) -> None:
        """The loader is done with its pair."""
        if self._held or self._pending or self._staged:
            with self.quiet():
                self._flush()
                self._finish_pending()
                for item in list(self._staged.values()):
                    with undisturbed():
                        self.press_rest(item, each_matrix=True)
        self.sources.current = None

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
        self._held, self._pending = [], []
        self._staged.clear()
        self.sources.clear()

    def waiting_problems(self) -> list[str]:
        """What came of an update, and could not be quantized."""
        return [
            f"{item.name} {list(item.shape)}: only parts of scale groups came; nothing wrote {item.gaps}"
            for item in self._staged.values()
        ]

    @property
    def unfinished(self) -> list[Item]:
        """Items of which some boxes were written and are not in their storage."""
        return [*self._staged.values(), *(held.item for held in self._held)]

    # -- what loaders do ----------------------------------------------------------------------------------------------

    def copy(self, item: Item, view: Tensor, values: Tensor) -> None:
        if values.is_meta and view.numel():
            raise LoaderError(f"{item.name}: a loader copies a tensor that is on meta, and has no values")
        if item.scheme and _holds_weights(view) and values.ndim and not _holds_weights(values):
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
            for place, taken, source in self.sources.split(view, values):
                self._turn_to(item, source)
                taken = taken.expand(place.shape)
                self._put(item, self._trace(item, place, source, taken), taken, source, place)

    def copy_final(self, item: Item, final: Tensor, view: Tensor, values: Tensor) -> None:
        storage = item.quantized
        if storage is None or final is not storage.weight:
            self.touch_final(item)
            return
        with self.quiet():
            source, values = self.sources.of(values), values.expand(view.shape)
            shape, offset = item.stored_shape, offset_of(view) - offset_of(final)
            try:
                pieces = trace_view(
                    shape, final.stride(), offset, view.shape, view.stride(), values.stride(), offset_of(values)
                )
            except ValueError as error:
                raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error
            # two axes that change places, or none
            pieces = [item.as_stored(piece)._replace(src_name=source.label) for piece in pieces]
            self._turn_to(item, source)
            self._put(item, pieces, values, source, None)

    def touch_final(self, item: Item) -> None:
        with self.quiet():
            raise LoaderError(
                f"{item.name}: a loader reads or changes it when its layer is finished, and would deal in FP8 numbers "
                "without their scale. Keep the weight out of the recipe, or let the loader do so before the next tensor."  # noqa: E501
            )

    def put(self, item: Item, pieces: Sequence[Piece], values: Tensor) -> None:
        """Boxes of an item, and where ``values``, which nobody changes in place, holds theirs: offsets and strides are
        those of its storage."""
        source = self.sources.of(values)
        self._turn_to(item, source)
        pieces = [piece._replace(src_name=source.label) for piece in pieces]
        if item in self._staged.values() or not self._goes_straight(item, pieces, values):
            self._put(item, pieces, values, source, None)
            return
        boxes = [Box.of(piece) for piece in pieces]
        self._claim(item, boxes, source)
        for piece, box in zip(pieces, boxes, strict=True):
            event = Event("quantize", item.layers[0].name, item.name, box, source.name)
            self._press(item, item.as_stored(piece), values, event)
            self.ledger.event(event)
        self._wrote(item, boxes, source, pieces)

    def _put(self, item: Item, pieces: list[Piece], values: Tensor, source: Source, view: Tensor | None) -> None:
        boxes = [Box.of(piece) for piece in pieces]
        self._claim(item, boxes, source)
        if self._goes_straight(item, pieces, values):
            self._held.append(_Held(item, pieces, values, source, view))
            if self.sources.current is None:
                self._flush()  # nobody says when the tensor may change
                self.quantizer.settle()
        elif view is None:
            self._unhold(item)
            real = self.materialize(item)
            for piece in pieces:
                piece.region(real).copy_(values_of(piece, values))
        else:
            self._real(item, view).copy_(values)
        self._wrote(item, boxes, source, pieces)

    def fill(self, item: Item, view: Tensor, run: Callable[[Tensor], Any]) -> None:
        source = self.sources.of(None)._replace(sure=True)  # no second tensor hides in one value for all
        with self.quiet():
            self._turn_to(item, source)
            boxes = self._boxes(item, view)
            # one value for all is how loaders begin, not what they load; for a part, it is padding
            if item.writes or sum(box.numel for box in boxes) < item.numel:
                self._claim(item, boxes, source)
                self._wrote(item, boxes, source)
            run(self._real(item, view))

    def scatter(
        self, item: Item, view: Tensor, values: Tensor | None, run: Callable[[Tensor], Any], mark: Mark
    ) -> None:
        with self.quiet():
            mask = torch.zeros(view.shape, dtype=torch.int32, device="cpu")
            labels, sources = self._labels(values)
            mark(mask, labels)
            marked = [(source, self._marked(item, view, mask == n)) for n, source in enumerate(sources, 1)]
            for source, boxes in marked:
                self._turn_to(item, source)
                self._claim(item, boxes, source)
            run(self._real(item, view))
            for source, boxes in marked:
                self._wrote(item, boxes, source, [Piece(*box, source.label, 0, (0,) * len(box.off)) for box in boxes])

    def _labels(self, values: Tensor | None) -> tuple[Tensor, list[Source]]:
        """The sources of values, and a number for each element that tells which, or one for all."""
        one = torch.ones((), dtype=torch.int32, device="cpu")
        if values is None or not values.ndim:
            return one, [self.sources.of(values)]
        labels = torch.ones(values.shape, dtype=torch.int32, device="cpu")
        parts = self.sources.split(labels, values)
        sources = list(dict.fromkeys(part.source for part in parts))
        for part in parts:
            part.place.fill_(1 + sources.index(part.source))
        return labels, sources

    def overwrite(self, item: Item, view: Tensor) -> Tensor:
        source = self.sources.of(None)
        with self.quiet():
            self._turn_to(item, source)
            boxes = self._boxes(item, view)
            self._claim(item, boxes, source)
            real = self._real(item, view)
            self._wrote(item, boxes, source, [Piece(*box, source.label, 0, (0,) * len(box.off)) for box in boxes])
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
                if item.quantized is not None and any(self._stored(item, box).common(done) for done in item.pressed):
                    raise LoaderError(
                        f"{item.name}{box}: a loader reads or changes what is quantized already. With direct=False a "
                        "layer stays in high precision until it is complete."
                    )
            return self._real(item, view)

    def device_of(self, item: Item) -> torch.device:
        return item.device

    def mutated(self, tensor: Tensor) -> None:
        self.quantizer.settle()
        if self._held and any(storage_key(held.values) == storage_key(tensor) for held in self._held):
            with self.quiet():
                self._flush()
                self.quantizer.settle()

    def computed(
        self,
        func: Any,
        args: Sequence[Any],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> None:
        with self.quiet():
            self.sources.computed(func, args, inputs, targets, made)
            self.unfilled.computed(func, inputs, targets, made)

    def escaped(self, tensor: Tensor) -> None:
        self.unfilled.forget(tensor)
        item = self.inventory.find(tensor)
        if item is not None and not item.virtual:
            item.gaps.boxes = []  # whoever writes there does not tell

    # -- boxes --------------------------------------------------------------------------------------------------------

    def _trace(self, item: Item, view: Tensor, source: Source, values: Tensor) -> list[Piece]:
        try:
            offset, sizes, strides = item.elements(view)
            if sizes != list(values.shape):
                raise NoBoxError(f"bits are written as {view.dtype}")
            return trace_view(
                item.shape, item.strides, offset, sizes, strides, values.stride(), offset_of(values), source.label
            )
        except ValueError as error:
            raise LoaderError(f"{item.name}: a write that boxes can't express: {error}") from error

    def _boxes(self, item: Item, view: Tensor) -> list[Box]:
        try:
            offset, sizes, strides = item.elements(view)
            return [Box.of(p) for p in trace_view(item.shape, item.strides, offset, sizes, strides, (0,) * len(sizes))]
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

    def _stored(self, item: Item, box: Box) -> Box:
        axes = item.stored_axes
        return Box(tuple(box.off[d] for d in axes), tuple(box.size[d] for d in axes))

    def _claim(self, item: Item, boxes: Sequence[Box], source: Source) -> None:
        """A box may be written once, or again by the pair that wrote it: what counts is the result."""
        if source.mixed and item.scheme and schemes.get(item.scheme).group_rows != 1:
            raise LoaderError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: a loader has made its values of {source.name}, in a way "
                f"in which nobody can tell whose they are; of rows that come from different tensors {item.scheme} has "
                "scales of their own. Copy each tensor by itself, or choose a scheme whose groups lie within rows."
            )
        loose = item.is_buffer and not item.required  # a table that the loader may fill as it likes
        if item.settled and not self._updating and self._duplicates == "error" and not loose:
            raise CoverageError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: {source.name} comes when the layer is complete and "
                "finished. Two tensors for one box are an error; with duplicates='update' the later one wins."
            )
        if item.provided:
            raise LoaderError(
                f"{item.name}{''.join(map(str, boxes[:1]))}: {source.name} comes when a function of yours has finished "
                "the layer: only it knows what it made of it. Drop the earlier tensor in a transform."
            )
        for box in () if loose else boxes:
            again = item.gaps.written(box)
            if again is None:
                continue
            writers = {piece.src_name for piece in item.writes if again.common(Box.of(piece))}
            if source.sure and writers <= {source.label} and not item.settled:
                self._unhold(item)
                self._rewrite(item, box)
            elif self._duplicates == "error":
                first = ", ".join(sorted(name.rpartition("#")[0] for name in writers)) or "padding"
                raise CoverageError(
                    f"{item.name}{again} is written twice: by {first}, and by {source.name}. With duplicates='update' "
                    "the later one wins."
                )
            else:
                self._flush()
                self._rewrite(item, box)

    def _rewrite(self, item: Item, box: Box) -> None:
        """What is in FP8 of a box gets other values, with scales of their own: only whole scale groups can."""
        box = self._stored(item, box)
        met = [done for done in item.pressed if done.common(box)]
        if not met:
            return
        self.quantizer.press()  # the former values of a box go first
        storage = self._storage(item)
        whole = Piece(*box, "", 0, (0,) * len(box.off))
        if storage.parts is None and storage.scheme.group_rows != 1:  # groups are those of the boxes as they came
            fits = all(done.common(box) == done for done in met)
        else:
            fits = all(storage.holds_groups(Box.of(cut)) for cut in storage.split(whole))
        if not fits:
            raise LoaderError(
                f"{item.name}{box}: a loader writes once more a part of scale groups that are quantized already. With "
                "direct=False a layer stays in high precision until it is complete; what comes later still must be "
                "written as a whole."
            )
        item.pressed = [rest for done in item.pressed for rest in done.without(box)]

    def _wrote(self, item: Item, boxes: Sequence[Box], source: Source, pieces: Sequence[Piece] = ()) -> None:
        for box in boxes:
            item.gaps.fill(box)
            self.ledger.event(Event("write", item.layers[0].name, item.name, box, source.name))
        item.writes += pieces
        item.changed |= not item.scheme
        for layer in item.layers:
            if not layer.finished and layer not in self._pending and layer.is_complete():
                self._pending.append(layer)

    # -- where values go ----------------------------------------------------------------------------------------------

    def _turn_to(self, item: Item, source: Source) -> None:
        """What went before is over, unless it concerns the same source and layer."""
        if self._held and (self._held[-1].source.number != source.number or self._held[-1].item.layers != item.layers):
            self._flush()
        if self._pending and not all(layer in item.layers for layer in self._pending):
            self._flush()
            self._finish_pending(but=item.layers)

    def _finish_pending(self, but: Sequence[Layer] = ()) -> None:
        for layer in [layer for layer in self._pending if layer not in but]:
            self._pending.remove(layer)
            self.finish(layer)

    def settle_streamed(self, placement: Placement, storage: Storage) -> None:
        """A stream has filled an item's final storage; a layer of which that was the last is finished."""
        item = next(item for item in self.inventory.items if item.name == placement.name)
        if placement.scheme:
            scheme = schemes.get(placement.scheme)
            item.quantized = QuantizedStorage(item.name, storage.weight, scheme, placement.parts, storage.scale)
        else:
            item.real = storage.weight
        item.gaps.boxes = []
        for layer in item.layers:
            if layer.is_complete() and not layer.finished:
                self.finish(layer)

    def reopen(self, layer: Layer) -> None:
        """A complete layer got another parameter."""
        if layer in self._pending and not layer.is_complete():
            self._pending.remove(layer)

    def _goes_straight(self, item: Item, pieces: Sequence[Piece], values: Tensor) -> bool:
        """Whether a write is quantized without high-precision storage."""
        if not item.scheme or item.real is not None or item.padding or not (self._direct or item.settled):
            return False
        if not _holds_weights(values):
            return False
        storage = self._storage(item)
        return all(
            storage.holds_groups(Box.of(cut)) for piece in pieces for cut in storage.split(item.as_stored(piece))
        )

    def _storage(self, item: Item) -> QuantizedStorage:
        storage, new = item.quantized_storage()
        if new:
            self.ledger.hold(storage.nbytes)
        return storage

    def _real(self, item: Item, view: Tensor) -> Tensor:
        """The view on real storage, which is allocated now if there is none."""
        self._unhold(item)
        if not item.virtual:
            return view
        return item.like(view, self.materialize(item))

    def materialize(self, item: Item) -> Tensor:
        """High-precision storage of an item."""
        if item.real is None:
            self.ledger.event(Event("materialize", item.layers[0].name, item.name))
            self.ledger.hold(item.allocate().nbytes)
            if item.settled and item.scheme:
                self._staged[id(item)] = item
        assert item.real is not None
        return item.real

    def _unhold(self, item: Item) -> None:
        """Writes that were to be quantized go into high-precision storage after all: the loader changes them."""
        mine = [held for held in self._held if held.item is item]
        self._held = [held for held in self._held if held.item is not item]
        for held in mine:
            self._stage(held)

    def _stage(self, held: _Held) -> None:
        real = self.materialize(held.item)
        if held.view is not None:
            held.item.like(held.view, real).copy_(held.values)
            return
        for piece in held.pieces:
            piece.region(real).copy_(values_of(piece, held.values))

    def _flush(self) -> None:
        """Quantize what is held."""
        if self._held:
            with undisturbed():
                self._press_held()

    def _press_held(self) -> None:
        while self._held:
            held = self._held[0]
            item, storage = held.item, self._storage(held.item)
            together = [item.as_stored(piece) for other in self._held if other.item is item for piece in other.pieces]
            matrices = {piece.dst_off[:-2] for piece in together}
            if storage.parts is None and storage.scheme.group_rows != 1 and len(matrices) < len(together):
                # several boxes of one tensor: whether they share scale groups shows when the layer is complete
                self._unhold(item)
                continue
            for piece in held.pieces:
                event = Event("quantize", item.layers[0].name, item.name, Box.of(piece), held.source.name)
                self._press(item, item.as_stored(piece), held.values, event)
                self.ledger.event(event)
            self._held.pop(0)

    def _press(self, item: Item, stored: Piece, values: Tensor, what: Event) -> None:
        storage = self._storage(item)
        for cut in storage.split(stored):
            dtype = item.dtype if item.cast or values.dtype not in dtypes.QUANTIZABLE else None
            if storage.parts is not None and not storage.holds_groups(Box.of(cut)):
                raise LoaderError(f"{what}: holds parts of scale groups whose rest is quantized. Write it as a whole.")
            self.quantizer.put(storage, cut, values_of(cut, values), dtype, what)
            item.pressed.append(Box.of(cut))
            item.changed = True

    def press_rest(self, item: Item, *, each_matrix: bool = False) -> None:
        """Quantize what is in high-precision storage, wherever all of a part of rows is there.

        Args:
            each_matrix: of a stack, do not wait for the other matrices.
        """
        storage = self._storage(item)
        parts = storage.parts or cut_parts(item.stored_shape, [item.as_stored(piece) for piece in item.writes])
        *lead, _, cols = item.stored_shape
        left, missing = Gaps(item.stored_shape), [self._stored(item, gap) for gap in item.gaps.boxes]
        for box in item.pressed:
            left.fill(box)
        matrices = itertools.product(*map(range, lead)) if each_matrix else [None]
        waits = False
        for matrix in matrices:
            start, off, size = 0, matrix or (0,) * len(lead), (1,) * len(lead) if matrix else tuple(lead)
            for rows in parts:
                band = Box((*off, start, 0), (*size, rows, cols))
                start += rows
                inside = [common for box in left.boxes if (common := box.common(band))]
                if not inside:
                    continue
                if any(band.common(gap) for gap in missing):
                    waits |= any(rest for box in inside for rest in _outside(box, missing))
                    continue
                whole = sum(box.numel for box in inside) == band.numel
                for box in [band] if whole else inside:
                    assert item.real is not None
                    values = item.real.permute(item.stored_axes)[box.slices]
                    piece = Piece(*box, "", offset_of(values), tuple(values.stride()))
                    self._press(item, piece, values, Event("quantize", item.layers[0].name, item.name, box))
        if not waits and item.settled:
            self.release(item)

    def release(self, item: Item) -> None:
        """High-precision storage is not needed any more."""
        self._staged.pop(id(item), None)
        if item.real is not None:
            self.ledger.hold(-item.real.nbytes)
        item.real = None


def _holds_weights(tensor: Tensor) -> bool:
    """Whether its numbers mean something by themselves; else they are bits, or lack their scales."""
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def _outside(box: Box, holes: Sequence[Box]) -> list[Box]:
    left = [box]
    for hole in holes:
        left = [rest for part in left for rest in part.without(hole)]
    return left
