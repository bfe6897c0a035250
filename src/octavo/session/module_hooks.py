"""Hooks that see what loaders do to modules: they register parameters, tie them, put others in their place."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..errors import LoaderError
from ..planning.recipe import Decision
from .parameters import Face, Item, Layer
from .report import LayerwiseReport
from .writes import Writes


class _Active(threading.local):
    """The hooks of this thread's sessions."""

    def __init__(self) -> None:
        self.hooks: list[ModuleHooks] = []


_active = _Active()


def _parameter(module: nn.Module, leaf: str, tensor: Any) -> Any:
    """What the session of the module's model makes of a parameter; None if nothing."""
    made = (hooks.parameter(module, leaf, tensor) for hooks in _active.hooks)
    return next((other for other in made if other is not None), None)


def _buffer(module: nn.Module, leaf: str, tensor: Any) -> Any:
    made = (hooks.buffer(module, leaf, tensor) for hooks in _active.hooks)
    return next((other for other in made if other is not None), None)


@functools.cache
def _register() -> None:
    """Have torch call hooks, from the first session on.

    They are not removed: torch keeps hooks in a dictionary, and a thread that makes a module in the moment in which
    another removes one fails. Where there is no session they cost a tenth of a microsecond a parameter.
    """
    register_module_parameter_registration_hook(_parameter)
    register_module_buffer_registration_hook(_buffer)


class ModuleHooks:
    """Hooks of `torch.nn.modules.module` for the modules of a model that is loaded, in this thread."""

    def __init__(self, writes: Writes, report: LayerwiseReport) -> None:
        self._writes, self._inventory, self._report = writes, writes.inventory, report

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Modules call the hooks, until this is left."""
        _register()
        _active.hooks.append(self)
        try:
            yield
        finally:
            _active.hooks.remove(self)

    def parameter(self, module: nn.Module, leaf: str, tensor: nn.Parameter | None) -> nn.Parameter | None:
        """A loader gives a module a parameter; returns the one that takes its place, if there is one."""
        if self._writes.paused or tensor is None or (layer := self._inventory.layer_of(module)) is None:
            return None
        if (final := self._inventory.find_final(tensor)) is not None:
            if tensor is module._parameters.get(leaf):
                return None
            name = f"{layer.name}.{leaf}" if layer.name else leaf
            raise LoaderError(
                f"{name}: a loader ties it to {final[0].name}, whose layer is finished, and is quantized. Tie them "
                "before the weights come, or keep the weight out of the recipe."
            )
        known = self._inventory.find(tensor)
        if known is not None and known.scheme and not _seen_alike(known, tensor):
            raise LoaderError(
                f"{known.name}: a loader registers it in another shape or order of axes, {list(tensor.shape)}; its "
                "scale groups run along rows as they were. Keep it out of the recipe."
            )
        if known is not None and known.virtual:  # the same tensor in another place, or seen in another shape
            known.show(Face(module, leaf, tensor))
            return None
        present: nn.Parameter | None = self.buffer(module, leaf, tensor)
        if present is not None:
            return present
        if layer.finished:
            layer = Layer(layer.name, module, late=True)
            self._inventory.layers.append(layer)
        item = self._inventory.add(layer, leaf, tensor)
        if item is None:
            return None
        item.decision = Decision(None, "registered while loading")
        self._report.kept[item.name] = item.decision.reason
        self._inventory.track(item, tensor)
        if tensor.is_meta:
            item.hide()
            self._writes.reopen(layer)
            return None
        # the loader's own memory: it holds its values, or gets them
        self._writes.refuse_codes(item, (tensor,))
        item.keep(tensor)
        item.expect(self._writes.unfilled.gaps(tensor))
        item.required = bool(item.gaps) and not self._inventory.is_optional(item)
        self._writes.unfilled.forget(tensor)
        self._writes.ledger.hold(item.nbytes)
        if item.required:
            self._writes.reopen(layer)
        return None

    def buffer(self, module: nn.Module, leaf: str, tensor: Tensor | None) -> Any:
        """A loader puts a tensor of its own in an item's place: it is copied there instead."""
        present = module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
        item = None if self._writes.paused or tensor is None else self._inventory.find(present)
        final = None if self._writes.paused or tensor is None else self._inventory.find_final(present)
        if item is None and final is not None:
            item = final[0]
        if tensor is None or present is None or item is None or not (item.virtual or item.settled):
            return None
        if self._inventory.find(tensor) is item:  # the same one, in whatever shape
            return None if item.virtual else present
        if self._writes.unfilled.gaps(tensor):
            raise LoaderError(
                f"{item.name}: a loader puts memory in its place that nothing was written to. Fill it first, or write "
                "to the parameter that is there."
            )
        if present.shape != tensor.shape:
            raise LoaderError(
                f"{item.name} {list(present.shape)}: a loader puts a tensor of another shape in its place, "
                f"{list(tensor.shape)}"
            )
        if final is not None:
            self._writes.copy_final(*final, present.detach(), tensor.detach())
        else:
            self._writes.copy(item, present.detach(), tensor.detach())
        return present


def _seen_alike(item: Item, tensor: Tensor) -> bool:
    return (tuple(tensor.shape), tuple(tensor.stride())) == (item.shape, item.strides)
