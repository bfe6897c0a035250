"""The modules and the memory of a model on meta, exchanged for those of its FP8 form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...running import modules
from ...streaming.sinks import Storage

#: what quantization_config.quant_method says of a model that octavo quantized
METHOD = "octavo"


def swap(model: Any, weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Give the modules of some weights their FP8 form, storage not yet assigned.

    Args:
        weights: (name, scheme, parts) of each, as a plan decides them, or as `quantized_weights` told them of a model
            that was saved.
    """
    for name, scheme, parts in weights:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            modules.quantize_linear(model, path, scheme, parts)
            continue
        shape = tuple(getattr(module, leaf).shape)
        if module.is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        modules.quantize_stack(module, leaf, scheme, shape, parts)


def assign(model: Any, storages: Mapping[str, Storage]) -> None:
    """Give parameters and buffers the memory that a stream has filled."""
    for name, storage in storages.items():
        _set(model, name, storage.weight)
        if storage.scale is not None:
            _set(model, modules.scale_name(name), storage.scale)


def _set(model: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter
