"""Which tensors have come for which layer, while vLLM is given new weights.

vLLM counts the elements that come for a layer, and processes it when they are as many as it has, or when the update
ends; what has not come is then whatever its memory held. So names are counted, too.

While a layer waits for more, vLLM has most of its parameters on meta, and keeps what comes; these have *moved*. Others
(biases, since 0.32) are written at once, and are restored from a copy where the layer has to stay as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...errors import CoverageError
from ..engine import arrivals
from ..engine.survey import Fillers
from . import versions
from .telling import log


class _Layer(arrivals.Layer):
    def __init__(self, name: str, module: nn.Module, fillers: Mapping[str, frozenset[str]]) -> None:
        super().__init__(name, fillers)
        self.module = module
        self.moved: frozenset[str] | None = None  # known once it has waited
        self.before: dict[str, Tensor] = {}  # what has not moved, as it was

    @property
    def waits(self) -> bool:
        return versions.waits(self.module)

    def begin(self) -> None:
        tensors = {name: getattr(self.module, name) for name in frozenset().union(*self.fillers.values())}
        self.moved = frozenset(name for name, tensor in tensors.items() if tensor.is_meta)
        self.before = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in self.moved}

    def count(self) -> int:
        return versions.count(self.module)

    def drop_what_came(self) -> None:
        versions.forget_what_came(self.module)

    def restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self.before.items():
                getattr(self.module, name).copy_(tensor)

    def moving(self, name: str) -> bool:
        """Return True if a tensor goes to parameters that have moved."""
        return self.moved is None or bool(self.fillers[name] & self.moved)

    def forget(self) -> None:
        super().forget()
        self.before.clear()


class Arrivals(arrivals.Arrivals[_Layer]):
    """Of a model of vLLM."""

    engine = "vLLM"
    log = log

    def __init__(self, model: nn.Module, fillers: Fillers) -> None:
        # later, a path may lead to what LoRA has put around the layer
        super().__init__(model, [_Layer(name, model.get_submodule(name), mine) for name, mine in fillers.items()])

    def add(self, name: str) -> None:
        for layer in self.layers_of(name):
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
