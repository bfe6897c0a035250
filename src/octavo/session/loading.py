"""A load's beginning and end: parameters give their memory back, and none that was not loaded looks loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..elements.operations import storage_key
from ..errors import WeightError
from .finish import on_meta, set_tensor
from .inventory import Inventory
from .parameters import Item
from .report import LayerwiseReport, Ledger


def begin(inventory: Inventory, ledger: Ledger, report: LayerwiseReport) -> None:
    """Parameters give their memory back, unless their values may be right as they are."""
    stays = {storage_key(item.faces[0].tensor) for item in inventory.items if not item.required}
    for item in inventory.items:
        face = item.faces[0].tensor
        inventory.track(item, face)
        if face.is_meta:
            item.twin = face.detach()
        elif storage_key(face) in stays or not _owns_its_storage(face):
            item.real = face.detach()
            ledger.hold(item.nbytes)
            if item.required:
                report.notes.append(f"{item.name}: its memory is shared or not torch's own: it stays")
        else:
            item.twin = torch.empty_strided(item.shape, item.strides, dtype=item.dtype, device="meta")
            inventory.track(item, item.twin)
        if not item.scheme and not item.is_buffer:
            report.kept[item.name] = item.decision.reason
        item.restart()
    for item in inventory.items:
        if item.virtual and not item.faces[0].tensor.is_meta:
            item.give_back()
    for layer in inventory.layers:  # tables that the model computes are no layer
        layer.finished = all(item.is_buffer and not item.required for item in layer.items)


def coverage_problems(inventory: Inventory) -> list[str]:
    """What the loader has not written, parameter by parameter."""
    problems, present = [], {id(module) for module in inventory.model.modules()}
    for item in inventory.items:
        if not item.gaps or (not item.required and item.untouched) or _has_other_memory(item):
            continue
        if not any(id(face.module) in present for face in item.faces):
            continue  # the loader took the module out of the model
        what = "nothing was loaded" if item.untouched else f"nothing wrote {item.gaps}"
        problems.append(f"{item.name} {list(item.shape)}: {what}")
    return problems


def strangers(inventory: Inventory) -> list[str]:
    """Modules that the loader built and put into the model, which are its own."""
    known = {id(layer.module) for layer in inventory.layers}
    return [
        path
        for path, module in inventory.model.named_modules()
        if id(module) not in known and any(p is not None for p in module._parameters.values())
    ]


def abandon(inventory: Inventory, error: BaseException) -> None:
    """Nothing that looks loaded: what is not finished, or was found to be bad at the end, is on meta."""
    for item in inventory.items:
        bad = isinstance(error, WeightError) and is_about(error, item)
        if (item.settled and not bad) or not item.virtual:
            continue
        for face in item.faces:
            if bad or not face.tensor.is_meta:
                set_tensor(item, face, on_meta(item, face))
        item.real = item.quantized = None


def is_about(error: BaseException, item: Item) -> bool:
    """Whether an error names a parameter."""
    return str(error).partition("[")[0] == item.name


def _owns_its_storage(tensor: Tensor) -> bool:
    """Whether memory that is given back was this tensor's alone (views of one storage keep it)."""
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _has_other_memory(item: Item) -> bool:
    """Whether a loader gave its own parameter memory that it brought (``parameter.data = tensor``)."""
    real = None if item.virtual else item.real
    return real is not None and storage_key(item.faces[0].tensor) != storage_key(real)
