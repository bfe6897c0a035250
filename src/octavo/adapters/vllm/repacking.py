"""Unquantized experts on a CPU, packed for their kernel each time that they are loaded.

vLLM has its kernel pack them the first time only. What a reload brings would be copied, as it came, to where the kernel
reads packed weights: wrong numbers without a word, or an error where packing pads. Where vLLM packs, nothing is done.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.platforms import current_platform


def follow(model: nn.Module) -> None:
    """Have experts packed whenever vLLM processes them. To be called between loading and processing."""
    if current_platform.is_cpu():
        methods = {id(method): method for m in model.modules() if hasattr(method := _method(m), "moe_kernel")}
        for method in methods.values():
            _watch(method)


def _method(module: nn.Module) -> Any:
    return getattr(module, "quant_method", None)


def _watch(method: Any) -> None:
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: nn.Module) -> None:
        experts: Any = getattr(method.moe_kernel, "fused_experts", None)
        pack = getattr(experts, "process_weights_after_loading", None)
        if pack is None:  # the first time
            process(layer)
            return
        packed = []

        def noted(*args: Any, **kwargs: Any) -> None:
            packed.append(True)
            pack(*args, **kwargs)

        experts.process_weights_after_loading = noted
        try:
            process(layer)
        finally:
            del experts.process_weights_after_loading
        # a kernel that was made anew has been given its weights
        if not packed and getattr(method.moe_kernel, "fused_experts", None) is experts:
            pack(layer)

    method.process_weights_after_loading = process_weights_after_loading
