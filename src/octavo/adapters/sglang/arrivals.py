"""Which tensors have come for which layer, while SGLang is given new weights.

SGLang has no notion of a layer that waits: a loader writes what it is given. So layers wait here: see `Form`. Where an
update begins, it did not say before 0.5.2x, either. A tensor that comes again begins another: what waits is forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from torch import nn

from ...errors import CoverageError, Lines
from ..engine import arrivals
from ..engine.survey import Fillers
from .forms import Form, Forms


class _Layer(arrivals.Layer):
    def __init__(self, name: str, form: Form, fillers: Mapping[str, frozenset[str]]) -> None:
        super().__init__(name, fillers)
        self.form = form
        self.version: str | None = None  # of the weights that came first, where a trainer has said it

    @property
    def waits(self) -> bool:
        return True

    def begin(self) -> None:
        self.form.begin()

    def count(self) -> int:
        return len(self.lacking())  # where none is lacking, the loader has not written all that came

    def drop_what_came(self) -> None:
        self.form.drop()

    def restore(self) -> None:
        """What is written already is whole."""


class Arrivals(arrivals.Arrivals[_Layer]):
    """Of a model of SGLang."""

    engine = "SGLang"
    log = logging.getLogger("sglang.srt.octavo")

    def __init__(self, model: nn.Module, fillers: Fillers, forms: Forms) -> None:
        super().__init__(model, [_Layer(name, forms[name], mine) for name, mine in fillers.items()])
        self._lost: set[_Layer] = set()  # layers whose memory holds nothing, until they have come whole
        self._sent: dict[str, str | None] = {}  # what has come since the update began, as far as known -> its version
        self.version: str | None = None  # of the weights that a call brings; not all trainers say it
        self._again = ""  # the first tensor that came again, so that another update must have begun

    def lose(self) -> None:
        """All layers hold nothing: their memory has been given back."""
        self.drop()
        self._lost.update(self.layers)

    def add(self, name: str) -> None:
        if name in self._sent and not self._is_new(self._sent[name]):
            self._begin_another(name)
        self._sent[name] = self.version
        for layer in self.layers_of(name):
            if layer.came and self._is_new(layer.version):
                layer.leave_as_it_was()  # of an update that broke off
            if not layer.came:
                layer.begin()
                layer.version = self.version
            layer.came.add(name)

    def _is_new(self, before: str | None) -> bool:
        """Return True where a call is known to bring another version than what has come before."""
        return None not in (before, self.version) and before != self.version

    def is_written_at_once(self, name: str) -> bool:
        """Return True for a tensor that a loader puts into a layer which does not wait for others, or anywhere."""
        layers = self.layers_of(name)
        return not layers or not all(layer.form.stages for layer in layers)

    def _begin_another(self, name: str) -> None:
        for layer in self.layers:
            if layer.came:
                layer.leave_as_it_was()
        self._sent.clear()
        self._again = self._again or name

    def drop(self) -> None:
        super().drop()
        self._forget_sent()

    def _forget_sent(self) -> None:
        self._sent.clear()
        self._again = ""

    def take(self, name: str, check: Callable[[], None]) -> None:
        """After the loader has been handed a tensor: have layers that are whole be new, if ``check`` does not raise."""
        for layer in self.layers_of(name):
            if layer.came and not layer.lacking():
                check()
                self._complete(layer)

    def prune(self) -> None:
        for layer in self.layers:
            if layer.came and not layer.lacking():
                self._complete(layer)

    def _complete(self, layer: _Layer) -> None:
        if layer.form.complete():
            layer.forget()
            self._lost.discard(layer)

    def check_complete(self) -> None:
        again = self._again
        self._forget_sent()
        try:
            super().check_complete()
        except CoverageError as error:
            if not again:
                raise
            more = f"{again} came twice: if an update before this one broke off, layers may be mixed of both."
            raise CoverageError(Lines.of(*str(error).splitlines(), f"{more} Send all tensors again.")) from None
        if names := sorted(layer.name for layer in self._lost):
            more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
            raise CoverageError(
                f"{self._model_name}, new weights: nothing came for {names[0]}{more}, and what they held is lost since "
                "release_memory_occupation. Send all tensors, or start with --enable-weights-cpu-backup."
            )
