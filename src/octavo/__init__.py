"""octavo: a large model's weights, from a bf16 checkpoint to FP8 in their place, while they stream.

    model = octavo.load("Qwen/Qwen3-8B")                 # a transformers model, in FP8
    octavo.convert("Qwen/Qwen3-8B", "qwen3-8b-fp8")      # an FP8 checkpoint on disk

``help(octavo.load)`` explains every argument, and so it is with `plan`, `convert`, `verify`, `stream`, `update` and
`layerwise`. Importing octavo takes no time: each name is imported when it is first asked for, and torch with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers and editors see
    from . import errors as errors
    from . import schemes as schemes
    from .adapters.transformers.quantizer import OctavoConfig
    from .api import convert, load, plan, stream, verify
    from .api_models import layerwise, update
    from .errors import OctavoError
    from .planning.recipe import Recipe

__all__ = [
    "OctavoConfig",
    "OctavoError",
    "Recipe",
    "convert",
    "layerwise",
    "load",
    "plan",
    "stream",
    "update",
    "verify",
]

#: the module that defines a public name, where it is not `octavo.api`
_DEFINED_IN = {
    "OctavoConfig": ".adapters.transformers.quantizer",
    "OctavoError": ".errors",
    "Recipe": ".planning.recipe",
    "layerwise": ".api_models",
    "update": ".api_models",
}
_MODULES = ("errors", "schemes")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_DEFINED_IN.get(name, ".api"), __name__)
    globals()[name] = found = getattr(module, name)  # found without this function from now on
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
