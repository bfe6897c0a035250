"""An update's beginning and end: high-precision parameters are lent, and the FP8 ones come back, at their addresses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..elements.operations import offset_of
from ..errors import LoaderError, UpdateError, WeightError
from ..numerics import schemes
from ..running import modules
from .finish import on_meta, set_tensor
from .inventory import Inventory
from .loading import is_about


def lend(inventory: Inventory, *, follow: bool) -> None:
    """Loaders see high-precision parameters again; what they write goes into the FP8 storage that exists.

    Args:
        follow: put them into the model; else it stays as it is.
    """
    for item in inventory.items:
        item.installed = None
    for item in inventory.items:
        item.restart()
        face = item.faces[0]
        if item.scheme:
            module, scale = face.module, modules.scale_name(face.leaf)
            weight, scales = module._parameters.get(face.leaf), module._parameters.get(scale)
            assert item.quantized is not None
            if weight is None or scales is None or weight.dtype != schemes.FP8:
                raise LoaderError(
                    f"{item.name}: the model no longer has its FP8 numbers and {scale}, so it can't be updated in "
                    "place. Load it anew."
                )
            item.installed = weight
            # the model may have moved since
            item.quantized.weight, item.quantized.scale, item.device = weight.data, scales.data, weight.device
            lent = on_meta(item, face)
            item.faces, item.twin, item.real = [face._replace(tensor=lent)], lent.detach(), None
            if follow:
                inventory.track_final(item, item.quantized.weight)
                inventory.track_final(item, item.quantized.scale)
                inventory.track(item, lent)
                set_tensor(item, face, lent)
        else:
            holder: Any = face.module._buffers if item.is_buffer else face.module._parameters
            tensor = holder[face.leaf]
            item.twin, item.real, item.required = None, tensor.detach(), not item.is_buffer
            item.offset, item.strides = offset_of(tensor), tuple(tensor.stride())
            inventory.track(item, tensor)


def take_back(inventory: Inventory) -> None:
    """The model has its FP8 parameters again: the same objects, at the same addresses."""
    for item in inventory.items:
        if item.installed is not None:
            set_tensor(item, item.faces[0], item.installed)
            item.real = None


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
