"""Tensors beside the parameters that show a parameter's memory, kept right where an engine reloads.

A module may hold a view of a parameter (Mamba's ``conv_weights``). Engines leave such views as they are in a reload,
since what is copied into the parameter shows in them. Where processing has put other memory under the parameter, as
it does on a CPU that packs weights, the view still shows what was loaded first, and would do so for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...elements.operations import storage_key


def follow(model: nn.Module) -> None:
    """Have views of parameters be given new values with them. To be called between loading and processing."""
    homes: dict[int, list[tuple[Any, str, Tensor]]] = {}
    for layer in model.modules():
        if hasattr(getattr(layer, "quant_method", None), "process_weights_after_loading"):
            for name, weight in layer.named_parameters(recurse=False):
                if (key := storage_key(weight)) is not None:
                    homes.setdefault(key, []).append((layer, name, weight))
    views: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = {}
    for module in model.modules():
        for tensor in _beside(module):
            for layer, name, parameter in homes.get(storage_key(tensor) or 0, ()):
                views.setdefault(layer, []).append((name, parameter, tensor))
    for layer, mine in views.items():
        _watch(layer, mine)


def _beside(module: nn.Module) -> Iterator[Tensor]:
    """What a module holds that is no parameter."""
    for value in (*module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            yield value


def _watch(layer: Any, views: list[tuple[str, Tensor, Tensor]]) -> None:
    """Write to views what a parameter holds before it is processed, where they have ceased to show it."""
    method = layer.quant_method
    process = method.process_weights_after_loading
    # relative to the parameter, which a reload makes anew
    places = [
        (name, view, tuple(view.shape), view.stride(), int(view.storage_offset() - parameter.storage_offset()))
        for name, parameter, view in views
    ]

    def process_weights_after_loading(given: nn.Module) -> None:
        fresh = []
        for name, view, size, strides, offset in places if given is layer else ():
            loaded = getattr(layer, name).detach()
            if storage_key(loaded) != storage_key(view):  # in a reload
                begin = int(loaded.storage_offset()) + offset
                fresh.append((view, loaded.as_strided(size, strides, begin).clone()))
        process(given)
        with torch.no_grad():
            for view, values in fresh:
                view.copy_(values)

    method.process_weights_after_loading = process_weights_after_loading
