"""Layers that an engine can't make in FP8 are made unquantized, and the reason is kept; it would end at the first one.

Whether a layer fits depends on its sides, on how it is cut for ranks, on what is fused in it, and on the kernels that
this machine has. The engine's own code is asked, by having it make the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import OctavoError
from .survey import error_text

#: layer -> why it was made unquantized
Refused = MutableMapping[nn.Module, str]


@dataclass(frozen=True)
class Fitting:
    """An engine's layers.

    Args:
        can_be_plain: whether there is such a layer without quantization, too.
        unquantized: makes its method for that.
        check: raises what the engine would raise later for a layer that was made in FP8.
    """

    can_be_plain: Callable[[nn.Module], bool]
    unquantized: Callable[[Any], Any]
    check: Callable[[Any], None] = lambda _: None

    def fitted(self, ways: Sequence[Callable[[], Any]], layer: nn.Module, refused: Refused) -> Any:
        """The method for a layer, by the first of these ways that can make its weights; else one without quantization.

        The reason is that of the first way.
        """
        if not self.can_be_plain(layer):
            return ways[0]()
        given, rest = _names(layer), [*ways]
        while rest:
            try:
                method = rest.pop(0)()
            except OctavoError:
                raise
            except Exception as error:
                _undo(layer, error, given, refused)
            else:
                if method is not None and hasattr(method, "create_weights"):
                    self._watch(method, rest, layer, _names(layer) - given, refused)
                return method
        return self.unquantized(layer)

    def _watch(
        self, method: Any, rest: Sequence[Callable[[], Any]], layer: Any, by_asking: Collection[str], refused: Refused
    ) -> None:
        """Have a method make weights by another way if it can't."""
        create = method.create_weights

        def create_weights(*args: Any, **kwargs: Any) -> Any:
            del method.create_weights  # nothing of this stays
            before = _names(layer).difference(by_asking)
            try:
                made = create(*args, **kwargs)
                self.check(layer)
            except Exception as error:
                _undo(layer, error, before, refused)
                layer.quant_method = self.fitted(rest, layer, refused)
                return layer.quant_method.create_weights(*args, **kwargs)
            refused.pop(layer, None)
            return made

        method.create_weights = create_weights


def _names(layer: nn.Module) -> set[str]:
    """Of all that a layer has."""
    return {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}


def _undo(layer: nn.Module, error: Exception, given: Collection[str], refused: Refused) -> None:
    """Keep the first reason, and leave nothing of the attempt in the layer."""
    refused.setdefault(layer, re.sub(r"\.\d+\b", ".*", error_text(error)))  # the same for all layers
    for name in _names(layer).difference(given):
        delattr(layer, name)
