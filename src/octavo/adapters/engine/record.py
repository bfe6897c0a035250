"""A survey as JSON, and back: for the same checkpoint, and a model that is made alike.

Tensors of the checkpoint are written as their numbers; shapes, reasons and whatever else thousands of placements have
in common are written once. What is read back is not trusted: each piece has to lie in its tensor, all pieces of a
parameter to tile it, and each parameter has to lie in the model's memory, with the right shape and dtype. Whatever does
not is a ValueError, or what Python and torch raise of such things.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...conversion.formats import Format
from ...elements.views import View
from ...planning.plan import Plan
from ...streaming.sinks import Memory
from ..remembering.checked import natural, naturals, require, texts
from ..remembering.rows import Json, Numbers, Reading, Row, Writing, reach
from .filling import check_filling, left_to_loader, targets_of
from .homes import memory_of
from .placing import Places
from .survey import Survey


@dataclass(frozen=True)
class Record:
    """How surveys of one checkpoint in one model are written and read.

    Args:
        plan: as that of all that is read, without placements.
        layout: names of scales.
        device: that all placements have.
    """

    checkpoint: Checkpoint
    model: nn.Module
    plan: Plan
    layout: Format
    device: str

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, found: Survey) -> Json:
        """Raise a ValueError where there is something that this form has no place for."""
        require(found, found.places is not None and not found.keep and not found.refused)
        assert found.places is not None
        require(found, dataclasses.replace(found.plan, placements=()) == self.plan)
        places, writing = found.places, Writing(self.checkpoint, self._numbers, self.device)
        known = {id(placement): number for number, placement in enumerate(found.plan.placements)}
        rows = [*map(writing.row, found.plan.placements)]
        direct = [
            [
                known[id(placement)] if id(placement) in known else writing.row(placement),
                *self._storage(places.storages[placement.name]),
            ]
            for placement in places.direct.placements
        ]
        written = {
            "placements": rows,
            "direct": direct,
            "rest": [known[id(placement)] for placement in places.rest.placements],
            **writing.common(),
            "layers": found.layers,
            "unread": [self._number(name) for name in found.unread],
            "fillers": self._fillers(found),
            "constants": self._constants(found),
        }
        self._check_filling(found, direct, written["constants"])
        return written

    def _storage(self, storage: Memory) -> list[Json]:
        return [None if tensor is None else self._place(tensor) for tensor in storage.tensors]

    def _place(self, tensor: Tensor) -> list[Json]:
        """The parameter in which a view lies, and where."""
        view = View.of(tensor)
        for name, home in self._homes.get(tensor.untyped_storage()._cdata, ()):
            if _holds(home, view):
                return [name, *view]
        raise ValueError("a place that no parameter holds")

    def _constants(self, found: Survey) -> list[Json]:
        written = []
        for constant in found.constants:
            home = self._memory[constant.target].detach()
            region = home.as_strided(constant.into.size, constant.into.strides, constant.into.offset)
            value = region.flatten()[0].item()
            exact = region.double() if region.is_floating_point() else region  # FP8 compares with nothing
            require(value, math.isfinite(value) and bool((exact == value).all()))
            written.append([constant.target, *constant.into, value])
        return written

    def _fillers(self, found: Survey) -> Json:
        sets = Numbers()
        layers = {
            layer: [number for name, to in mine.items() for number in (self._number(name), sets.of(to))]
            for layer, mine in found.fillers.items()
        }
        return {"layers": layers, "sets": [sorted(to) for to in sets.rows()]}

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, record: Json) -> Survey:
        """The survey; constants are written to the model's memory.

        Raises:
            Exception: whatever comes of what is not as it was written.
        """
        reading = Reading(self.checkpoint, self._names, self.device, record)
        placements = [reading.placement(row) for row in record["placements"]]
        direct, storages = [], {}
        for row, *places in record["direct"]:
            placement = placements[row] if type(row) is int else reading.placement(row)
            direct.append(placement)
            views = [None if place is None else self._view(place) for place in places]
            storages[placement.name] = memory_of(placement, views, self.layout, self.device)
        require(storages, len(storages) == len(direct))
        plan = dataclasses.replace(self.plan, placements=tuple(placements))
        rest = dataclasses.replace(plan, placements=tuple(placements[number] for number in record["rest"]))
        found = Survey(
            plan,
            Places(dataclasses.replace(plan, placements=tuple(direct)), storages, rest),
            natural(record["layers"]),
            tuple(map(self._name, record["unread"])),
            self._fillers_of(record["fillers"]),
        )
        constants = [(self._view(place), value) for *place, value in record["constants"]]
        self._check_filling(found, record["direct"], record["constants"])
        with torch.no_grad():
            for region, value in constants:
                region.fill_(value)
        return found

    def _check_filling(self, found: Survey, direct: Iterable[Row], constants: Iterable[Row]) -> None:
        """Raise a ValueError unless places, and what the loader computes, fill what tensors go to."""
        placed = [(place[0], View(*place[1:])) for _, *places in direct for place in places if place is not None]
        padding = [(target, View(*place)) for target, *place, _ in constants]
        others = {name for name, _ in self.model.named_buffers()} | left_to_loader(found, self.layout)
        check_filling(self._memory, placed, padding, targets_of(found.fillers), others)

    def _view(self, place: Sequence[Json]) -> Tensor:
        name, offset, size, strides = place
        view, home = View(natural(offset), naturals(size), naturals(strides)), self._memory[name]
        require(place, len(view.size) == len(view.strides) and _holds(home, view))
        return home.detach().as_strided(view.size, view.strides, view.offset)

    def _fillers_of(self, record: Json) -> dict[str, dict[str, frozenset[str]]]:
        sets, found = [frozenset(texts(names)) for names in record["sets"]], {}
        names = self._names
        for layer, flat in record["layers"].items():
            own = self._names_in(layer)
            mine = {
                name if isinstance(name, str) else names[name]: sets[to]
                for name, to in zip(flat[::2], flat[1::2], strict=True)
            }
            require(layer, all(to <= own for to in {*mine.values()}))
            found[layer] = mine
        return found

    def _names_in(self, layer: str) -> set[str]:
        module = self.model.get_submodule(layer)
        return {*module._parameters, *module._buffers}

    # -- names, and memory --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _names(self) -> list[str]:
        """The tensors of the checkpoint, and what their scales are called."""
        tensors = [*self.checkpoint.tensors]
        return [*tensors, *map(self.layout.scale_name, tensors)]

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in reversed([*enumerate(self._names)])}

    def _number(self, name: str) -> int | str:
        """The number of a name, or the name if it has none: that of a matrix of a stack."""
        return self._numbers.get(name, name)

    def _name(self, number: int | str) -> str:
        return number if isinstance(number, str) else self._names[number]

    @functools.cached_property
    def _memory(self) -> Mapping[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())

    @functools.cached_property
    def _homes(self) -> Mapping[int, list[tuple[str, Tensor]]]:
        """The identity of memory -> what lies there."""
        found: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in self._memory.items():
            found.setdefault(tensor.untyped_storage()._cdata, []).append((name, tensor))
        return found


def _holds(home: Tensor, view: View) -> bool:
    """Return True if a view lies in the memory between a tensor's first element and its last."""
    offset, size, strides = View.of(home)
    end = offset + reach(size, strides)
    return offset <= view.offset and view.offset + reach(view.size, view.strides) <= end
