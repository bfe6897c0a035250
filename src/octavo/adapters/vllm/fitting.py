"""Layers that vLLM can't make in FP8 are made unquantized, and the reason is kept; vLLM would end at the first one.

Whether a layer fits depends on its sides, on how it is cut for ranks, on what is fused in it, and on the kernels that
this machine has. vLLM's own code is asked, by having it make the layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ...errors import OctavoError
from ..engine.survey import error_text

#: layer -> why it was made unquantized
Refused = MutableMapping[nn.Module, str]


def fitted(ways: Sequence[Callable[[], Any]], layer: nn.Module, refused: Refused) -> Any:
    """vLLM's method for a layer, by the first of these ways that can make its weights; else one without quantization.

    The reason is that of the first way.
    """
    if not can_be_plain(layer):
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
                _watch(method, rest, layer, _names(layer) - given, refused)
            return method
    return _unquantized(layer)


def _watch(
    method: Any, rest: Sequence[Callable[[], Any]], layer: Any, by_asking: Collection[str], refused: Refused
) -> None:
    """Have a method make weights by another way if it can't."""
    create = method.create_weights

    def create_weights(*args: Any, **kwargs: Any) -> Any:
        del method.create_weights  # nothing of this stays
        before = _names(layer).difference(by_asking)
        try:
            made = create(*args, **kwargs)
            _try_activations(layer)
        except Exception as error:
            _undo(layer, error, before, refused)
            layer.quant_method = fitted(rest, layer, refused)
            return layer.quant_method.create_weights(*args, **kwargs)
        refused.pop(layer, None)
        return made

    method.create_weights = create_weights


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, LinearBase)


def can_be_plain(layer: nn.Module) -> bool:
    """Return True for linear layers and experts, which there are without quantization, too."""
    return is_linear(layer) or hasattr(layer, "moe_config")


def _try_activations(layer: nn.Module) -> None:
    """Raise what quantizing activations raises where their groups don't divide a row."""
    kernel, weight = getattr(getattr(layer, "scheme", None), "fp8_linear", None), layer._parameters.get("weight")
    group = getattr(getattr(kernel, "quant_fp8", None), "group_size", 0)
    if weight is None or weight.is_meta or not group or weight.shape[1] % group == 0:
        return
    if getattr(kernel, "apply_input_quant", False):
        kernel.quant_fp8(torch.zeros(1, weight.shape[1], dtype=kernel.config.input_dtype, device=weight.device))  # type: ignore[union-attr]


def _names(layer: nn.Module) -> set[str]:
    """Of all that a layer has."""
    return {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}


def _undo(layer: nn.Module, error: Exception, given: Collection[str], refused: Refused) -> None:
    """Keep the first reason, and leave nothing of the attempt in the layer."""
    refused.setdefault(layer, re.sub(r"\.\d+\b", ".*", error_text(error)))  # the same for all layers
    for name in _names(layer).difference(given):
        delattr(layer, name)


def _unquantized(layer: Any) -> Any:
    if is_linear(layer):
        return UnquantizedLinearMethod()
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod(layer.moe_config)
