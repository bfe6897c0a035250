"""High-precision values of a box to FP8, in bounded memory.

The bytes are those of `octavo.schemes.quantize` of the whole parameter with its parts, whatever the boxes: each box
must hold whole scale groups. On a CPU, nothing is written before a box's scales are known to be finite. On an
accelerator nobody waits to learn that, and boxes are quantized many at a time (`octavo.session.quantize.batches`).
"""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor

from ...elements.pieces import Piece
from ...errors import WeightError
from ...numerics import schemes
from ...numerics.schemes import Scheme
from ...planning.budget import TILE_ELEMENTS
from ...planning.chunks import Tile, cut_tiles
from ...streaming.on_cpu import Tiles
from .batches import Batches
from .storage import QuantizedStorage


def has_batches(device: torch.device) -> bool:
    """Return True if boxes are quantized in batches on a device, since launching is what costs there."""
    return device.type != "cpu"


class Quantizer:
    """Quantizes boxes with scratch memory of its own: at most ``staging_bytes`` beside the values and the result."""

    def __init__(self, staging_bytes: int) -> None:
        self.staging_bytes = staging_bytes
        #: whether values that are put stay as they are, and somebody holds them anyway, so that many are copied at once
        self.values_stay = False
        self._tiles: dict[torch.device, Tiles] = {}
        self._batches: dict[torch.device, Batches] = {}

    def put(
        self, storage: QuantizedStorage, piece: Piece, values: Tensor, dtype: torch.dtype | None, what: object
    ) -> None:
        """Quantize ``values``, of the piece's size and strides and cast to ``dtype`` (None: as they are), into its box.

        Args:
            what: says in an error what the values are.

        Raises:
            WeightError: values that are not finite. For those on an accelerator, `check` raises it.
        """
        dtype, box, batches = dtype or values.dtype, piece.box, self._batches_on(storage.weight.device)
        if batches is not None:
            whole = _whole_tiles(piece.size, storage.scheme, batches.limit_bytes // dtype.itemsize)
            if whole is not None and len(whole) == 1:
                batches.put(storage, piece, values, dtype, what)
            elif whole is not None:
                for tile in whole:
                    part, off = tile.region(values), map(operator.add, piece.dst_off, tile.box.dst_off)
                    cut = Piece(tuple(off), tile.box.size, "", 0, tuple(part.stride()))
                    batches.put(storage, cut, part, dtype, what)
            if whole is not None:
                if not self.values_stay:
                    batches.gather()
                return
            batches.press()  # which may hold former values of the same box
        tiles, scheme = self._tiles_on(storage.weight.device), storage.scheme
        grid = tiles.amax(values, scheme, (0, 0), dtype)
        if batches is None and not torch.isfinite(grid).all():
            raise WeightError(_nonfinite(what))
        scale = schemes.scale_from_amax(grid, scheme)
        tiles.quantize(schemes.region(storage.numbers, piece.box), values, scale, scheme, (0, 0), dtype)
        storage.scale_place(box).copy_(schemes.to_stored(scale, scheme))
        if batches is not None:
            batches.watch(grid, storage, piece, what)

    def press(self) -> None:
        """Quantize what waits on an accelerator."""
        for batches in self._batches.values():
            batches.press()

    def gather(self) -> None:
        """Hold no values that were put any more; the device may still read them."""
        for batches in self._batches.values():
            batches.gather()

    def settle(self) -> None:
        """Wait until no values that were put are needed any more."""
        for batches in self._batches.values():
            batches.settle()

    @property
    def lost(self) -> list[object]:
        """Values that were put and are in no storage, since an error came between."""
        return [what for batches in self._batches.values() for what in batches.lost]

    def check(self) -> None:
        """Raise for what was quantized on an accelerator and was not finite."""
        for what in [batches.suspect() for batches in self._batches.values()]:
            if what is not None:
                raise WeightError(_nonfinite(what))

    def close(self) -> None:
        """Drop what waits and what is not checked, and give back all memory."""
        for batches in self._batches.values():
            batches.close()
        self._batches, self._tiles = {}, {}

    def _batches_on(self, device: torch.device) -> Batches | None:
        if not has_batches(device):
            return None
        found = self._batches.get(device)
        if found is None:
            found = self._batches[device] = Batches(device, self.staging_bytes)
        return found

    def _tiles_on(self, device: torch.device) -> Tiles:
        found = self._tiles.get(device)
        if found is None:
            limit = TILE_ELEMENTS if device.type == "cpu" else self.staging_bytes // 16
            found = self._tiles[device] = Tiles(limit, device)
        return found


@functools.lru_cache(maxsize=4096)
def _whole_tiles(shape: tuple[int, ...], scheme: Scheme, limit: int) -> tuple[Tile, ...] | None:
    """Tiles of at most ``limit`` elements that hold whole scale groups, if there are such."""
    tiles = cut_tiles(shape, scheme, (0, 0), limit)
    cells = sum(math.prod(cells.stop - cells.start for cells in tile.cells) for tile in tiles)
    whole = cells == math.prod((*shape[:-2], *scheme.cells(*shape[-2:])))
    return tiles if whole and all(tile.box.numel <= limit for tile in tiles) else None


def _nonfinite(what: object) -> str:
    return (
        f"{what}: holds values that are not finite, which can't be quantized. Repair the source, or ignore this weight."
    )
