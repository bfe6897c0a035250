"""Values between a loader's write and their FP8 form: held, staged in high precision, or quantized.

A write that goes straight into FP8 is *held* until its pair is used up, since loaders change in place what they have
just written. What can't go straight (parts of scale groups, or a layer that is to stay whole until it is complete) is
*staged* in high-precision storage of its item.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checkpoint import dtypes
from ..elements.boxes import Box, Gaps
from ..elements.operations import offset_of, storage_key, undisturbed
from ..elements.pieces import Piece
from ..errors import LoaderError, WeightError
from ..planning.placement import cut_parts
from .coded import Coded
from .parameters import Item
from .quantize.quantizer import Quantizer
from .quantize.storage import QuantizedStorage, values_of
from .report import Event, Ledger
from .watch.origins import Origin


class Write(NamedTuple):
    """Boxes of an item that are written at once."""

    item: Item
    pieces: Sequence[Piece]
    values: Tensor
    origin: Origin
    view: Tensor | None = None  # where a loader wrote them; None: only the pieces tell


class Held:
    """Values on their way into storage.

    Args:
        direct: layers that are being loaded are quantized write by write.
        cast: values are quantized as the parameter's dtype holds them, and not as they come.
    """

    def __init__(self, quantizer: Quantizer, ledger: Ledger, *, direct: bool = True, cast: bool = True) -> None:
        self.quantizer, self._ledger, self._direct, self._cast = quantizer, ledger, direct, cast
        self.writes: list[Write] = []
        self._read_later: set[int | None] = set()  # storages of what is held
        #: final FP8 storage exists, and high-precision storage for some boxes
        self.staged: dict[int, Item] = {}

    def forget(self) -> None:
        """Drop what was not carried out."""
        self.writes = []
        self.staged.clear()

    @property
    def unfinished(self) -> list[Item]:
        """Items that were written to in part or in whole, whose final storage has not got all of it."""
        return [*self.staged.values(), *(write.item for write in self.writes)]

    def goes_straight(self, item: Item, pieces: Sequence[Piece], values: Tensor) -> bool:
        """Return True if a write can be quantized without high-precision storage."""
        if not item.scheme or item.real is not None or item.padding or not (self._direct or item.settled):
            return False
        if not holds_weights(values):
            return False
        storage = self.storage(item)
        return all(storage.holds_groups(cut.box) for piece in pieces for cut in storage.split(item.as_stored(piece)))

    def storage(self, item: Item) -> QuantizedStorage:
        """An item's FP8 storage, allocated when first asked for."""
        if item.quantized is None:
            self._ledger.hold(item.start_fp8().nbytes)
        assert item.quantized is not None
        return item.quantized

    # -- held ---------------------------------------------------------------------------------------------------------

    def hold(self, write: Write) -> None:
        """Quantize it later: see `flush`."""
        self.writes.append(write)
        self._read_later.add(storage_key(write.values))

    def reads_later(self, tensor: Tensor) -> bool:
        """Return True if something is held of a tensor's storage."""
        return bool(self.writes) and storage_key(tensor) in self._read_later

    def flush(self) -> None:
        """Quantize what is held."""
        if self.writes:
            with undisturbed():
                self._flush()

    def _flush(self) -> None:
        for item in {id(write.item): write.item for write in self.writes}.values():
            storage = self.storage(item)
            if storage.parts is None and storage.scheme.group_rows != 1:
                together = [
                    item.as_stored(piece) for write in self.writes if write.item is item for piece in write.pieces
                ]
                if len({piece.dst_off[:-2] for piece in together}) < len(together):
                    # several boxes of one tensor: whether they share scale groups shows when the layer is complete
                    self.unhold(item)
        writes, done = self.writes, 0
        try:
            for done, write in enumerate(writes):  # noqa: B007
                self.press_at_once(write)
            done = len(writes)
        finally:
            self.writes = writes[done:]
            self._read_later = {storage_key(other.values) for other in self.writes}

    def unhold(self, item: Item) -> None:
        """Writes that were to be quantized go into high-precision storage after all: the loader changes them."""
        mine = [write for write in self.writes if write.item is item]
        if not mine:
            return
        self.writes = [write for write in self.writes if write.item is not item]
        self._read_later = {storage_key(write.values) for write in self.writes}
        for write in mine:
            self.stage(write)

    # -- staged -------------------------------------------------------------------------------------------------------

    def stage(self, write: Write) -> None:
        """Copy values into the high-precision storage of their item."""
        if write.view is not None:
            self.real(write.item, write.view).copy_(write.values)
            return
        self.unhold(write.item)
        real = self.materialize(write.item)
        for piece in write.pieces:
            piece.region(real).copy_(values_of(piece, write.values))

    def real(self, item: Item, view: Tensor) -> Tensor:
        """The view on real storage, which is allocated now if there is none."""
        self.unhold(item)
        if not item.virtual:
            return view
        return item.like(view, self.materialize(item))

    def materialize(self, item: Item) -> Tensor:
        """High-precision storage of an item."""
        if item.real is None:
            self._ledger.event(item.event("materialize"))
            self._ledger.hold(item.allocate().nbytes)
            if item.settled and item.scheme:
                self.staged[id(item)] = item
        assert item.real is not None
        return item.real

    def release(self, item: Item) -> None:
        """High-precision storage is not needed any more."""
        self.staged.pop(id(item), None)
        if item.real is not None:
            self.quantizer.gather()
        self._ledger.hold(-item.release())

    # -- quantized ----------------------------------------------------------------------------------------------------

    def press_at_once(self, write: Write) -> None:
        """Quantize a write that goes straight into FP8."""
        item = write.item
        for piece in write.pieces:
            event = item.event("quantize", piece.box, write.origin.name)
            self.press(item, item.as_stored(piece), write.values, event)
            self._ledger.event(event)

    def passes(self, item: Item, pieces: Sequence[Piece], coded: Coded) -> bool:
        """Place numbers and scales as they are where the item holds just such; return False, and do nothing, if not."""
        storage = self.storage(item)
        found = None if item.transposed else [coded.passed(piece, storage) for piece in pieces]
        if found is None or any(scale is None for scale in found):
            return False
        self.quantizer.press()  # what came before for the same boxes goes first
        for piece, scale in zip(pieces, found, strict=True):
            assert scale is not None
            piece.region(storage.weight).copy_(coded.numbers(piece))
            storage.scale_place(piece.box).copy_(scale)
            item.note_pressed(piece.box)
        return True

    def press(self, item: Item, piece: Piece, values: Tensor, what: Event) -> None:
        """Quantize ``values`` of a piece along the axes of the item's storage."""
        storage = self.storage(item)
        for cut in storage.split(piece):
            dtype = item.dtype if self._cast or values.dtype not in dtypes.QUANTIZABLE else None
            assert storage.parts is None or storage.holds_groups(cut.box)
            taken = values_of(cut, values)
            try:
                self.quantizer.put(storage, cut, taken, dtype, what)
            except WeightError:  # before anything was written
                raise
            except BaseException:
                item.note_pressed(None)
                raise
            item.note_pressed(cut.box)

    def press_rest(self, item: Item, *, each_matrix: bool = False) -> None:
        """Quantize what is in high-precision storage, wherever all of a part of rows is there.

        Args:
            each_matrix: of a stack, do not wait for the other matrices.
        """
        storage = self.storage(item)
        parts = storage.parts or cut_parts(item.stored_shape, [item.as_stored(piece) for piece in item.writes])
        *lead, _, cols = item.stored_shape
        left, missing = Gaps(item.stored_shape), [stored(item, gap) for gap in item.gaps.boxes]
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
                    self.press(item, piece, values, item.event("quantize", box))
        if not waits and item.settled:
            self.release(item)

    def rewrite(self, item: Item, box: Box) -> None:
        """Let a box that is in FP8 get other values, with scales of their own. Only whole scale groups can."""
        box = stored(item, box)
        met = [done for done in item.pressed if done.common(box)]
        if not met:
            return
        self.quantizer.press()  # the former values of a box go first
        storage = self.storage(item)
        whole = Piece(*box, "", 0, (0,) * len(box.off))
        if storage.parts is None and storage.scheme.group_rows != 1:  # groups are those of the boxes as they came
            fits = all(done.common(box) == done for done in met)
        else:
            fits = all(storage.holds_groups(cut.box) for cut in storage.split(whole))
        if not fits:
            raise LoaderError(
                f"{item.name}{box}: a loader writes once more a part of scale groups that are quantized already. With "
                "direct=False a layer stays in high precision until it is complete; what comes later still must be "
                "written as a whole."
            )
        item.reopen(box)


def holds_weights(tensor: Tensor) -> bool:
    """Return True if a tensor's numbers mean something by themselves, and are no bits and lack no scales."""
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def stored(item: Item, box: Box) -> Box:
    """A box along the axes of an item's storage."""
    axes = item.stored_axes
    return Box(tuple(box.off[d] for d in axes), tuple(box.size[d] for d in axes))


def _outside(box: Box, holes: Sequence[Box]) -> list[Box]:
    left = [box]
    for hole in holes:
        left = [rest for part in left for rest in part.without(hole)]
    return left
