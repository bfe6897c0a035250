"""An update's beginning and end: high-precision parameters are lent, and the FP8 ones come back, at their addresses."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from ..errors import LoaderError, UpdateError, WeightError
from ..numerics import schemes
from ..running import modules
from .inventory import Inventory
from .loading import is_about
from .parameters import Item


def lend(inventory: Inventory, *, follow: bool) -> list[tuple[Item, Tensor]]:
    """Loaders see high-precision parameters again; what they write goes into the FP8 storage that exists.

    Args:
        follow: put them into the model; else it stays as it is.

    Returns:
        what `take_back` puts in its place again.
    """
    lent: list[tuple[Item, Tensor]] = []
    try:
        for item in inventory.items:
            item.restart()
            face = item.faces[0]
            if not item.scheme:
                holder: Any = face.module._buffers if item.is_buffer else face.module._parameters
                item.keep(holder[face.leaf])
                item.required = not item.is_buffer
                inventory.track(item, holder[face.leaf])
                continue
            scale = modules.scale_name(face.leaf)
            weight, scales = face.module._parameters.get(face.leaf), face.module._parameters.get(scale)
            if weight is None or scales is None or weight.dtype != schemes.FP8:
                raise LoaderError(
                    f"{item.name}: the model no longer has its FP8 numbers and {scale}, so it can't be updated in "
                    "place. Load it anew."
                )
            if follow:
                lent.append((item, weight))
                inventory.track(item, item.lend(weight, scales))
                assert item.quantized is not None
                assert item.quantized.scale is not None
                for final in (item.quantized.weight, item.quantized.scale):
                    inventory.track_final(item, final)
    except BaseException:
        take_back(lent)
        raise
    return lent


def take_back(lent: Iterable[tuple[Item, Tensor]]) -> None:
    """The model has its FP8 parameters again: the same objects, at the same addresses."""
    for item, weight in lent:
        item.take_back(weight)


def update_error(
    inventory: Inventory, unfinished: Collection[str], lost: Collection[str], error: BaseException
) -> UpdateError:
    """Which layers are new, old, or some of both when an update has failed.

    Args:
        unfinished: parameters of which something came that is not in its storage.
        lost: those of which nobody knows whether it is.
    """
    new: list[str] = []
    old: list[str] = []
    torn: list[str] = []
    for layer in inventory.layers:
        items = [item for item in layer.items if not item.is_buffer]
        if not items:
            continue
        fresh = all(not item.gaps and item.name not in {*unfinished, *lost} for item in items)
        # on an accelerator, what is not finite shows at the end
        bad = isinstance(error, WeightError) and any(is_about(error, item) for item in items)
        changed = any(item.changed or item.name in lost for item in items)
        group = new if fresh and not bad else torn if changed else old
        group.append(str(layer))
    text = (
        f"the update failed: {error}\n{len(new)} layers have the new weights{_listed(new)}; {len(old)} the old ones"
        f"{_listed(old)}; {len(torn)} some of both{_listed(torn)}. Run the whole update again."
    )
    return UpdateError(text, new, old, torn)


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
