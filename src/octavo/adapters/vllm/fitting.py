"""Which layers of vLLM there are without quantization, and what it finds out late about those in FP8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

from ..engine.fitting import Fitting


def check_kernel(method: Any, layer: Any) -> None:
    """Raise for experts that have no kernel here, which on some platforms vLLM says only when they have been loaded."""
    if getattr(method, "experts_cls", layer) is None:
        activation = getattr(layer.moe_config.activation, "value", layer.moe_config.activation)
        raise NotImplementedError(f"no kernel of {current_platform.device_name} takes these experts ({activation})")


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


def _unquantized(layer: Any) -> Any:
    if is_linear(layer):
        return UnquantizedLinearMethod()
    from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

    return UnquantizedFusedMoEMethod(layer.moe_config)


FITTING = Fitting(can_be_plain, _unquantized, _try_activations)
