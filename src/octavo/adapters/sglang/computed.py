"""What loaders of SGLang compute of weights once they have written them: ``post_load_weights``.

DeepSeek's makes the matrices of its attention from a projection, for the layers of which it was given tensors. In a dry
run there is nothing to compute of; and what octavo streams to its place was given to nobody. So calls are noted, and
made when all weights are there, for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..remembering import facts

#: what computes it
METHOD = "post_load_weights"
#: their argument for what has been loaded; without it, all layers count
_GIVEN = "weight_names"


class Computed:
    """Calls that a model's loader made."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {module: path for path, module in model.named_modules() if hasattr(module, METHOD)}
        self._calls: dict[nn.Module, dict[str, Any]] = {}
        self._new: list[str] = []

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Meanwhile, note calls and compute nothing."""
        for module in self._paths:
            module.__dict__[METHOD] = self._note(module)
        try:
            yield
        finally:
            for module in self._paths:
                del module.__dict__[METHOD]

    def _note(self, module: nn.Module) -> Any:
        def note(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(_parameters(module), args, strict=False)) | kwargs
            given.pop(_GIVEN, None)
            self._calls[module] = given
            self._new.append(f"{self._paths[module]}.{METHOD}".lstrip("."))
            self._new.append(facts.of_settings(given))

        return note

    def since(self) -> str:
        """Words for the calls since this was asked last."""
        words = "\n".join(self._new)
        self._new.clear()
        return words

    def compute(self) -> None:
        """Make the calls, each once."""
        for module, given in self._calls.items():
            getattr(module, METHOD)(**given)


def _parameters(module: nn.Module) -> list[str]:
    import inspect

    return [*inspect.signature(getattr(type(module), METHOD)).parameters][1:]
