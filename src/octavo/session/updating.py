"""An update's beginning and end: high-precision parameters are lent, and the FP8 ones come back, at their addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..errors import CoverageError, Lines, LoaderError, UpdateError, WeightError, raise_problems
from ..numerics import schemes
from ..running import modules
from .intake import Intake
from .inventory import Inventory
from .loading import is_about, use
from .parameters import Item
from .report import Event, LayerwiseReport


@contextlib.contextmanager
def lent(inventory: Inventory) -> Iterator[None]:
    """Loaders see high-precision parameters meanwhile; then the model has its FP8 ones again: the same objects."""
    installed: list[tuple[Item, Tensor]] = []
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
            leaf = modules.scale_name(face.leaf)
            weight: Tensor | None = face.module._parameters.get(face.leaf)
            scale = face.module._parameters.get(leaf)
            if weight is None or scale is None or weight.dtype != schemes.get(item.scheme).dtype:
                raise LoaderError(
                    f"{item.name}: the model no longer has its quantized numbers and {leaf}, so it can't be updated in "
                    "place. Load it anew."
                )
            installed.append((item, weight))
            inventory.track(item, item.lend(weight, scale))
            assert item.quantized is not None
            assert item.quantized.scale is not None
            for final in (item.quantized.weight, item.quantized.scale):
                inventory.track_final(item, final)
        yield
    finally:
        inventory.untrack()
        for item, weight in installed:
            item.take_back(weight)


@contextlib.contextmanager
def updating(inventory: Inventory, intake: Intake, report: LayerwiseReport, *, more: bool = False) -> Iterator[None]:
    """An update: what comes within goes into the storage that exists.

    Args:
        more: it is not over when this is left, unless it failed.

    Raises:
        UpdateError: whatever failed, and which layers are new, old or torn.
    """
    with use(inventory, intake, report, more=more):
        try:
            yield
            intake.turn()
            problems = [
                f"{item.name} {list(item.shape)}: only parts of scale groups came; nothing wrote {item.gaps}"
                for item in (() if more else intake.held.staged.values())
            ]
            raise_problems(CoverageError, type(inventory.model).__name__, problems)
            intake.quantizer.check()
        except Exception as error:
            intake.give_up()
            raise _update_error(inventory, intake, error) from error
        finally:
            report.updated = [str(layer) for layer in inventory.layers if any(item.changed for item in layer.items)]


def _update_error(inventory: Inventory, intake: Intake, error: BaseException) -> UpdateError:
    """Which layers are new, old, or some of both when an update has failed."""
    unfinished = {item.name for item in intake.held.unfinished}
    # of which nobody knows whether it is in its storage
    lost = {what.parameter for what in intake.quantizer.lost if isinstance(what, Event)}
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
    outcome = (
        f"{len(new)} layers have the new weights{_listed(new)}; {len(old)} the old ones{_listed(old)}; {len(torn)} "
        f"some of both{_listed(torn)}. Run the whole update again."
    )
    return UpdateError(Lines.of(*f"the update failed: {error}".splitlines(), outcome), new, old, torn)


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
