"""Which tensors have come for which layer, while an engine is given new weights.

Names are counted, against those that the dry run saw fill a layer. A layer for which some came and others did not stays
as it was. How a layer is left so, and when it is complete, is the engine's: see its own `Layer`.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from ...errors import CoverageError, raise_problems


class Layer(abc.ABC):
    """A layer, and the tensors that have come for it since it began to wait for them."""

    def __init__(self, name: str, fillers: Mapping[str, frozenset[str]]) -> None:
        self.name, self.fillers = name, fillers
        self.came: set[str] = set()
        self.counted_others = False  # elements of tensors that the checkpoint does not know have come

    @property
    @abc.abstractmethod
    def waits(self) -> bool:
        """Return True while tensors can be loaded into it."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Before the first of its tensors comes."""

    @abc.abstractmethod
    def count(self) -> int:
        """The elements that the engine has taken for it, while it waits."""

    @abc.abstractmethod
    def drop_what_came(self) -> None:
        """Have the engine forget it."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Give what has been written already its values back."""

    def moving(self, name: str) -> bool:
        """Return True if a tensor is not written before the layer is complete."""
        return True

    def lacking(self) -> list[str]:
        return sorted(name for name in self.fillers if name not in self.came and self.moving(name))

    def leave_as_it_was(self) -> None:
        self.restore()
        self.drop_what_came()
        self.forget()

    def forget(self) -> None:
        self.came.clear()
        self.counted_others = False

    @property
    def holds_fp8(self) -> bool:
        return any(name.endswith("_scale") for parameters in self.fillers.values() for name in parameters)


AnyLayer = TypeVar("AnyLayer", bound=Layer)


class Arrivals(abc.ABC, Generic[AnyLayer]):
    """Of one model. An update may take several calls of its ``load_weights``; layers wait from its beginning on."""

    engine: str
    log: logging.Logger

    def __init__(self, model: Any, layers: Iterable[AnyLayer]) -> None:
        self._model_name = type(model).__name__
        self.layers = list(layers)
        self._layers_of: dict[str, list[AnyLayer]] = {}
        for layer in self.layers:
            for name in layer.fillers:
                self._layers_of.setdefault(name, []).append(layer)
        #: parameters; one that is tied to another has a name, too
        self._own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.names: set[str] = set()  # all that has come in this update, but for what is passed over
        self._passed_over: dict[str, None] = {}  # by other names than the checkpoint's
        self._told: set[str] = set()
        self._beside: dict[str, list[str]] = {}  # module -> tensors of the checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self._layers_of

    def layers_of(self, name: str) -> Iterable[AnyLayer]:
        return self._layers_of.get(name, ())

    def waiting(self) -> set[str]:
        """The tensors that fill layers which wait."""
        return {name for layer in self.layers if layer.waits for name in layer.fillers}

    @abc.abstractmethod
    def add(self, name: str) -> None:
        """Before a tensor is handed to the model's loader.

        Raises:
            CoverageError: the engine would take it for something else.
        """

    def counts(self) -> list[tuple[AnyLayer, int]]:
        """The elements that have come for each layer that waits."""
        return [(layer, layer.count()) for layer in self.layers if layer.waits]

    def add_other(self, name: str, before: list[tuple[AnyLayer, int]]) -> None:
        """After the loader has been handed a tensor that the checkpoint does not know.

        Raises:
            CoverageError: it went into a layer that holds FP8, as it was.
        """
        for layer, count in before:
            if layer.count() == count or not layer.waits:
                continue
            if layer.holds_fp8:
                raise CoverageError(
                    f"{name}: is no tensor of the checkpoint, and {self.engine} puts it into {layer.name}, which holds "
                    f"FP8. Name tensors as the checkpoint does: {', '.join(sorted(layer.fillers)[:3])}, ..."
                )
            layer.counted_others = True

    def pass_over(self, name: str) -> None:
        """The loader has no use for a tensor, and the checkpoint has none of that name."""
        self._passed_over[name] = None

    def prune(self) -> None:
        """After a call: forget what came for layers that are complete."""
        for layer in self.layers:
            if (layer.came or layer.counted_others) and not layer.waits:
                layer.forget()

    def drop(self) -> None:
        """Leave every layer that waits as it was; what is sent from now on begins anew."""
        for layer in self.layers:
            if layer.waits:
                layer.leave_as_it_was()
            layer.forget()
        self.names.clear()
        self._passed_over.clear()

    def check_complete(self) -> None:
        """At the end of an update: leave layers as they were of which only a part has come, and raise for them."""
        problems = self._misnamed()
        for layer in self.layers:
            if not layer.waits or not (layer.came or layer.counted_others):
                continue
            came = sorted(name for name in layer.came if layer.moving(name))
            lacking = layer.lacking()
            if not came and not layer.counted_others:  # only what is written already: let the rest not be processed
                layer.drop_what_came()
            elif lacking:
                # a scale is made of its weight
                named = [name for name in lacking if not any(name != n and name.startswith(n) for n in lacking)]
                more = f" and {len(named) - 1} more" if len(named) > 1 else ""
                first = came[0] if came else "a tensor by another name"
                problems.append(f"{layer.name}: {first} came, {named[0]}{more} did not")
                layer.leave_as_it_was()
            elif not layer.count():  # else the engine would leave it as it was, without a word
                first = came[0] if came else "all"
                problems.append(f"{layer.name}: {first} came, and {self.engine}'s loader put it elsewhere")
                layer.leave_as_it_was()
            layer.forget()
        self.names.clear()
        advice = "These layers are as they were before; all others that came whole are new. Send whole layers."
        raise_problems(CoverageError, f"{self._model_name}, new weights", problems, advice)

    def _misnamed(self) -> list[str]:
        """What was passed over instead of tensors of which none came; a warning about what else was, once."""
        problems, harmless = [], []
        for name in self._passed_over:
            meant = self._meant(name)
            if meant is not None:
                problems.append(f"{name}: {self.engine}'s loader knows no such tensor, and {meant} did not come")
            else:
                harmless.append(name)
        self._passed_over.clear()
        strange = [name for name in harmless if name not in self._own]
        if strange and not self.names:
            came, known = _first(strange), _first(sorted(self._layers_of))
            return [f"{self.engine}'s loader knows nothing of what came: {came}; it knows {known}", *problems]
        harmless = [name for name in harmless if name not in self._told]
        self._told.update(harmless)
        if harmless:
            text = "octavo: an update brought what %s's loader passes over: %s (%s)"
            count = f"{len(harmless):,} tensor{'s' * (len(harmless) > 1)}"
            self.log.warning(text, self.engine, count, _first(harmless, 2))
        return problems

    def _meant(self, name: str) -> str | None:
        """A tensor of the checkpoint that did not come, and for which one by another name was sent, by its looks."""
        beside = self._near(name.rpartition(".")[0])
        if beside:
            return beside[0] if self.names.isdisjoint(beside) else None
        known = next((tail for tail in _tails(name) if tail in self._layers_of), self._by_tail.get(name))
        return known if known not in self.names else None

    @functools.cached_property
    def _by_tail(self) -> dict[str, str | None]:
        """What names of the checkpoint end in -> the name; None if several end so."""
        found: dict[str, str | None] = {}
        for name in self._layers_of:
            for tail in _tails(name):
                found[tail] = None if tail in found else name
        return found

    def _near(self, module: str) -> list[str]:
        """The tensors of the checkpoint in a module, or in the nearest one around it."""
        if module not in self._beside:
            inside = sorted(name for name in self._layers_of if name.startswith(f"{module}.")) if module else []
            self._beside[module] = inside if inside or not module else self._near(module.rpartition(".")[0])
        return self._beside[module]


def _tails(name: str) -> list[str]:
    """What a name ends in, longest first: all but its last word alone, which says little."""
    words = name.split(".")
    return [".".join(words[start:]) for start in range(1, len(words) - 1)]


def _first(names: list[str], most: int = 3) -> str:
    return f"{', '.join(names[:most])}{', ...' if len(names) > most else ''}"
