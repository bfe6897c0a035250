"""octavo: a large model's weights, from a bf16 checkpoint to FP8 in their place, while they stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import schemes as schemes
from ._version import __version__ as __version__

# Functions of the same names as the modules that implement them (plan, stream, convert, verify, layerwise) are bound
# after those modules, and so are what `octavo.plan` and the like mean.
from .api import convert, layerwise, load, plan, stream, update, verify
from .errors import OctavoError
from .planning.recipe import Recipe

if TYPE_CHECKING:
    from .adapters.transformers.quantizer import OctavoConfig

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


def __getattr__(name: str) -> Any:
    if name == "OctavoConfig":  # needs transformers, which is imported when it is first asked for
        from .adapters.transformers.quantizer import OctavoConfig

        return OctavoConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
