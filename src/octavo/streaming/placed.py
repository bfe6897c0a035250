"""Progress: how much of each placement is in its place, and the amax of scale groups that span chunks.

A placement is opened in the sink before its first chunk, and closed with its last element. Its chunks may come in any
order and from any thread.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..elements.pieces import Piece
from ..planning.chunks import Work
from ..planning.placement import Placement
from .ring import Ring
from .sinks import Destination, Sink


@dataclass(slots=True)
class _Open:
    """A placement that is not complete."""

    destination: Destination
    left: int  # elements
    amax: Tensor | None = None  # float32 grid, for groups that span chunks
    unread: dict[int, int] = field(default_factory=dict)  # unit -> AMAX chunks that are expected


class Placed:
    """All placements of a stream. Errors are those of the sink."""

    def __init__(self, sink: Sink, ring: Ring[Any]) -> None:
        self._sink, self._ring = sink, ring
        self._states: dict[str, _Open | None] = {}  # None once complete
        self._lock = threading.Lock()

    def open(self, placement: Placement) -> None:
        """Open a placement in the sink, unless it was opened before; may block until the sink has room."""
        if placement.name not in self._states:
            destination = self._sink.open(placement, self._ring)
            self._states[placement.name] = _Open(destination, math.prod(placement.stored_shape))

    def destination(self, placement: Placement) -> Destination:
        """The destination that takes the placement's bytes."""
        return self._state(placement).destination

    def done(self, placement: Placement, work: Work, piece: Piece) -> int:
        """Count elements, and close the placement with the last. Returns the bytes that are in their place by it."""
        elements = placement.elements(piece)
        placed = placement.bytes_of(elements)
        with self._lock:
            state = self._states[placement.name]
            if work is Work.AMAX or state is None:
                return 0
            state.left -= elements
            if state.left:
                return placed
            self._states[placement.name] = None  # whoever took the parameter may drop it
        state.destination.close()
        return placed + placement.scale_bytes

    # -- scale groups that span chunks --------------------------------------------------------------------------------

    def expect(self, placement: Placement, unit: int) -> None:
        """An amax of the unit will be folded in; `wait_amax` waits for it."""
        state = self._state(placement)
        with self._lock:
            state.unread[unit] = state.unread.get(unit, 0) + 1

    def fold(self, placement: Placement, cells: tuple[slice, ...], amax: Tensor, unit: int | None = None) -> None:
        """Fold the amax of some cells into the placement's; ``unit`` says that it was expected."""
        state = self._state(placement)
        with self._lock:
            if state.amax is None:
                state.amax = torch.zeros(placement.grid.grid_shape, dtype=torch.float32, device=amax.device)
            region = state.amax[cells]
            region.copy_(torch.maximum(region, amax))
            if unit is not None:
                state.unread[unit] -= 1
        if unit is not None:
            self._ring.update(lambda: None)

    def amax(self, placement: Placement, cells: tuple[slice, ...]) -> Tensor:
        """The amax that has been folded into some cells, float32."""
        amax = self._state(placement).amax
        assert amax is not None
        return amax[cells]

    def wait_amax(self, placement: Placement, cells: tuple[slice, ...], unit: int) -> Tensor:
        """`amax` of some cells, once every amax that is expected of the unit has been folded in."""
        unread = self._state(placement).unread
        self._ring.wait_for(lambda: not unread.get(unit))
        return self.amax(placement, cells)

    def _state(self, placement: Placement) -> _Open:
        state = self._states[placement.name]
        assert state is not None
        return state
