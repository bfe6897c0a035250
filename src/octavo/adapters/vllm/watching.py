"""What a quantization config of vLLM says of each layer while a model is built.

A layer that can't be built in FP8 is built unquantized, and the reason kept (see `fitting`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ...conversion.packing import PACKED
from ...numerics.schemes import NUMBERS
from .fitting import FITTING, is_linear


@dataclass
class Watch:
    """What was seen, by layer."""

    names: WeakKeyDictionary[nn.Module, list[str]] = field(default_factory=WeakKeyDictionary)  # as `ignore` wants them
    refused: WeakKeyDictionary[nn.Module, str] = field(default_factory=WeakKeyDictionary)
    asked: list[str] = field(default_factory=list)  # names that were looked up for the current layer

    def refusals(self, model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        """Layers that can't be built in FP8 -> why: where others of their kind can, and where none can.

        In the second case this machine may have no kernel, and another one have it.
        """
        modules = {path: module for path, module in model.named_modules() if module in self.names}
        built = {
            is_linear(m)
            for m in modules.values()
            if any(p.dtype in NUMBERS or name.endswith(PACKED) for name, p in m.named_parameters(recurse=False))
        }
        refused = {path: module for path, module in modules.items() if module in self.refused}
        plain = {path: self.refused[m] for path, m in refused.items() if is_linear(m) in built}
        return plain, {path: self.refused[m] for path, m in refused.items() if path not in plain}

    def get_quant_method(self, original: Callable[..., Any], config: Any, layer: nn.Module, prefix: str) -> Any:
        self.asked.clear()
        method = FITTING.fitted([functools.partial(original, config, layer, prefix)], layer, self.refused)
        self.names[layer] = _parts(config, prefix, self.asked)
        return method


def _parts(config: Any, prefix: str, asked: list[str]) -> list[str]:
    """The names by which a layer is called in a checkpoint's ``ignore``: of all that is fused in it."""
    front, _, leaf = prefix.rpartition(".")
    fused = getattr(config, "packed_modules_mapping", {}).get(leaf)
    if fused:
        return [f"{front}.{part}" if front else part for part in fused]
    return [name for name in dict.fromkeys(asked) if name.startswith(prefix)] or [prefix]


_current = Watch()


def watch(config: Any) -> Watch:
    """Watch all configs of this one's class from now on, instead of what was watched before."""
    global _current
    _current = Watch()
    kind = type(config)
    if not getattr(kind, "octavo_watches", False):
        kind.octavo_watches = True
        kind.get_quant_method = _watched(kind.get_quant_method)
        if hasattr(kind, "get_scheme_dict"):  # compressed-tensors' way to look a layer up
            kind.get_scheme_dict = _noted(kind.get_scheme_dict)
    return _current


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_quant_method(config: Any, layer: nn.Module, prefix: str) -> Any:
        return _current.get_quant_method(original, config, layer, prefix)

    return get_quant_method


def _noted(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_scheme_dict(config: Any, layer: nn.Module, layer_name: str | None = None) -> Any:
        if layer_name is not None:
            _current.asked.append(layer_name)
        return original(config, layer, layer_name)

    return get_scheme_dict
