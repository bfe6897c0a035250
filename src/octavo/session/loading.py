"""A load's beginning and end: parameters give their memory back, and none that was not loaded looks loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..elements.operations import storage_key
from ..errors import CoverageError, LoaderError, WeightError, raise_problems
from ..machine import now
from .emptied import Emptied
from .intake import Intake
from .inventory import Inventory
from .parameters import Item
from .report import LayerwiseReport, Ledger


@contextlib.contextmanager
def use(inventory: Inventory, intake: Intake, report: LayerwiseReport, *, more: bool = False) -> Iterator[None]:
    """A load or an update: whatever comes of it, its time is reported, and its memory goes.

    Args:
        more: if it succeeds, it is not over: what waits stays.
    """
    began, ledger = now(), intake.ledger
    try:
        with torch.no_grad():
            yield
    except BaseException:
        intake.give_up()
        more = False
        raise
    finally:
        intake.rest() if more else intake.close()
        inventory.untrack()
        report.total_s += now() - began
        report.peak_bytes, report.taken_bytes = ledger.peak_bytes, ledger.taken_bytes


@contextlib.contextmanager
def loading(inventory: Inventory, intake: Intake, report: LayerwiseReport) -> Iterator[None]:
    """A load: all that is required must come within.

    Raises:
        CoverageError: boxes that nothing wrote.
        WeightError: on an accelerator, a weight that is not finite.
    """
    emptied = Emptied()
    try:
        with use(inventory, intake, report):
            inventory.require()
            _refuse_changes(inventory)
            _begin(inventory, intake.ledger, report, emptied)
            yield
            intake.turn()
            emptied.check()
            advice = "Parameters that are right without a tensor can be named: optional=[...]."
            raise_problems(CoverageError, type(inventory.model).__name__, _coverage_problems(inventory), advice)
            present = {id(module) for module in inventory.model.modules()}
            for layer in inventory.layers:
                if not layer.finished and id(layer.module) in present:  # nothing of it was to be loaded
                    intake.finish(layer)
            intake.quantizer.check()
    except BaseException as error:
        for item in inventory.items:
            bad = isinstance(error, WeightError) and is_about(error, item)
            if item.virtual and (bad or not item.settled):
                item.abandon()
        raise
    finally:
        emptied.close()
    # modules that the loader took out of the model
    inventory.drop({item.name for item in inventory.items if item.virtual and not item.settled})


def _refuse_changes(inventory: Inventory) -> None:
    """Raise if the model is not what it was when the session was made: its parameters are not those to be filled."""
    for item in inventory.items:
        for module, leaf, tensor in item.faces:
            present = module._parameters.get(leaf, module._buffers.get(leaf))
            if present is not tensor or (tuple(present.shape), present.dtype) != (item.shape, item.dtype):
                raise LoaderError(
                    f"{item.name}: the model has another one than when the session was made (it was moved, cast, tied, "
                    "or loaded by another session). Make the session anew."
                )


def _begin(inventory: Inventory, ledger: Ledger, report: LayerwiseReport, emptied: Emptied) -> None:
    """Parameters give their memory back, unless their values may be right as they are; those that do are noted."""
    stays = {storage_key(item.faces[0].tensor) for item in inventory.items if not item.required}
    for item in inventory.items:
        face = item.faces[0].tensor
        inventory.track(item, face)
        if face.is_meta:
            item.hide()
        elif storage_key(face) in stays or not _owns_its_storage(face):
            item.keep(face)
            ledger.hold(item.nbytes)
            if item.required:
                report.notes.append(f"{item.name}: its memory is shared or not torch's own: it stays")
        else:
            inventory.track(item, item.hide())
        if not item.scheme and not item.is_buffer:
            report.kept[item.name] = item.decision.reason
        item.restart()
    real = [item for item in inventory.items if item.virtual and not item.faces[0].tensor.is_meta]
    emptied.empty(inventory, real)
    for layer in inventory.layers:  # tables that the model computes are no layer
        layer.finished = all(item.is_buffer and not item.required for item in layer.items)


def _coverage_problems(inventory: Inventory) -> list[str]:
    """List what the loader has not written, parameter by parameter."""
    problems, present = [], {id(module) for module in inventory.model.modules()}
    for item in inventory.items:
        blank = item.required and item.blank
        if not (item.gaps or blank) or (not item.required and item.untouched) or _has_other_memory(item):
            continue
        if not any(id(face.module) in present for face in item.faces):
            continue  # the loader took the module out of the model
        what = "nothing was loaded" if item.untouched or blank else f"nothing wrote {item.gaps}"
        what += ", only constants or random numbers were written" if blank else ""
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


def is_about(error: BaseException, item: Item) -> bool:
    """Return True if an error names a parameter."""
    return str(error).partition("[")[0] == item.name


def _owns_its_storage(tensor: Tensor) -> bool:
    """Return True if memory that is given back is this tensor's alone (views of one storage keep it)."""
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _has_other_memory(item: Item) -> bool:
    """Return True if a loader gave its own parameter memory that it brought (``parameter.data = tensor``)."""
    real = None if item.virtual else item.real
    return real is not None and storage_key(item.faces[0].tensor) != storage_key(real)
