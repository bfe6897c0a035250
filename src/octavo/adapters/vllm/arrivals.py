"""Which tensors have come for which layer, while vLLM is given new weights.

vLLM counts the elements that come for a layer, and processes it when they are as many as it has, or when the update
ends; what has not come is then whatever its memory held. So names are counted here, against those that the dry run saw
fill the layer. A layer for which some came and others did not stays as it was.

While a layer waits for more, vLLM has most of its parameters on meta, and keeps what comes; these have *moved*. Others
(biases, since 0.32) are written at once, and are restored from a copy where the layer has to stay as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import CoverageError, raise_problems
from ..engine.survey import Fillers
from . import versions


@dataclasses.dataclass
class _Layer:
    name: str
    module: nn.Module
    fillers: Mapping[str, frozenset[str]]
    came: set[str] = dataclasses.field(default_factory=set)
    counted_others: bool = False  # vLLM has counted elements of tensors that the checkpoint does not know
    moved: frozenset[str] | None = None  # known once it has waited
    before: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what has not moved, as it was

    @property
    def waits(self) -> bool:
        return versions.waits(self.module)

    def begin(self) -> None:
        """Before the first of its tensors comes."""
        tensors = {name: getattr(self.module, name) for name in frozenset().union(*self.fillers.values())}
        self.moved = frozenset(name for name, tensor in tensors.items() if tensor.is_meta)
        self.before = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in self.moved}

    def moving(self, name: str) -> bool:
        """Return True if a tensor goes to parameters that have moved."""
        return self.moved is None or bool(self.fillers[name] & self.moved)

    def lacking(self) -> list[str]:
        return sorted(name for name in self.fillers if name not in self.came and self.moving(name))

    def leave_as_it_was(self) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                getattr(self.module, name).copy_(tensor)
        versions.forget_what_came(self.module)
        self.forget()

    def forget(self) -> None:
        self.came.clear()
        self.before.clear()
        self.counted_others = False


class Arrivals:
    """Of one model. An update may take several calls of its ``load_weights``; layers wait from its beginning on."""

    def __init__(self, model: nn.Module, fillers: Fillers) -> None:
        self._model_name = type(model).__name__
        # later, a path may lead to what LoRA has put around the layer
        self._layers = [_Layer(name, model.get_submodule(name), mine) for name, mine in fillers.items()]
        self._layers_of: dict[str, list[_Layer]] = {}
        for layer in self._layers:
            for name in layer.fillers:
                self._layers_of.setdefault(name, []).append(layer)

    def __contains__(self, name: str) -> bool:
        return name in self._layers_of

    def waiting(self) -> set[str]:
        """The tensors that fill layers which wait."""
        return {name for layer in self._layers if layer.waits for name in layer.fillers}

    def add(self, name: str) -> None:
        """Before a tensor is handed to the model's loader.

        Raises:
            CoverageError: vLLM would take it for another tensor, or for the parameters of a kernel.
        """
        for layer in self._layers_of.get(name, ()):
            if not layer.waits:
                if layer.moving(name):
                    raise CoverageError(
                        f"{name}: came again, when {layer.name} was complete. That now holds what vLLM's kernels read, "
                        "into which weights can't be loaded. Send each tensor once in an update."
                    )
                continue
            if not layer.came:
                layer.begin()
            if name in layer.came:
                raise CoverageError(
                    f"{name}: came twice in one update, before {layer.name} was complete. vLLM counts elements, and "
                    "would take it for another tensor of that layer. Send each tensor once in an update."
                )
            layer.came.add(name)

    def counts(self) -> list[tuple[_Layer, int]]:
        """The elements that have come for each layer that waits."""
        return [(layer, versions.count(layer.module)) for layer in self._layers if layer.waits]

    def add_other(self, name: str, before: list[tuple[_Layer, int]]) -> None:
        """After the loader has been handed a tensor that the checkpoint does not know.

        Raises:
            CoverageError: it went into a layer that holds FP8, as it was.
        """
        for layer, count in before:
            if versions.count(layer.module) == count or not layer.waits:
                continue
            if any(parameter.endswith("_scale") for parameters in layer.fillers.values() for parameter in parameters):
                raise CoverageError(
                    f"{name}: is no tensor of the checkpoint, and vLLM puts it into {layer.name}, which holds FP8. "
                    f"Name tensors as the checkpoint does: {', '.join(sorted(layer.fillers)[:3])}, ..."
                )
            layer.counted_others = True

    def prune(self) -> None:
        """After a call: forget what came for layers that are complete."""
        for layer in self._layers:
            if (layer.came or layer.counted_others) and not layer.waits:
                layer.forget()

    def drop(self) -> None:
        """Leave every layer that waits as it was; what is sent from now on begins anew."""
        for layer in self._layers:
            if layer.waits:
                layer.leave_as_it_was()
            layer.forget()

    def check_complete(self) -> None:
        """At the end of an update: leave layers as they were of which only a part has come, and raise for them."""
        problems = []
        for layer in self._layers:
            if not layer.waits or not (layer.came or layer.counted_others):
                continue
            came = sorted(name for name in layer.came if layer.moving(name))
            lacking = layer.lacking()
            if not came and not layer.counted_others:  # only what vLLM has written already: let it not process the rest
                versions.forget_what_came(layer.module)
            elif lacking:
                # a scale is made of its weight
                named = [name for name in lacking if not any(name != n and name.startswith(n) for n in lacking)]
                more = f" and {len(named) - 1} more" if len(named) > 1 else ""
                first = came[0] if came else "a tensor by another name"
                problems.append(f"{layer.name}: {first} came, {named[0]}{more} did not")
                layer.leave_as_it_was()
            elif not versions.count(layer.module):  # else vLLM would leave it as it was, without a word
                problems.append(f"{layer.name}: {came[0] if came else 'all'} came, and vLLM's loader put it elsewhere")
                layer.leave_as_it_was()
            layer.forget()
        advice = "These layers are as they were before; all others that came whole are new. Send whole layers."
        raise_problems(CoverageError, f"{self._model_name}, new weights", problems, advice)
