"""What vLLM keeps beside the weights once it has them: what attention layers make of them after loading (MLA's
``W_UK`` and ``W_UV``, which are ``kv_b_proj`` in the dtype of the activations).

Their own code is asked, on meta. It undoes quantization by running a layer's kernel, so it is shown layers that have
none. What quantized layers make of their own weights is a form of the same size, and is not asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from ...elements.operations import storage_key
from ...numerics.schemes import FP8
from ...text import pattern


def made_after_loading(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Layers, as a pattern -> bytes that they will hold beside the parameters that the model has now."""
    held = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[str, int] = {}
    with _unquantized(model, dtype):
        for name, layer in model.named_modules():
            if not isinstance(layer, AttentionLayerBase):
                continue
            before, given = held | {storage_key(tensor) for tensor in _tensors(layer)}, {*layer._parameters}
            # a kernel that has no form on meta packs what there is
            with contextlib.suppress(Exception):
                layer.process_weights_after_loading(dtype)
            new = {storage_key(t): t.untyped_storage().nbytes() for t in _tensors(layer)}
            for made in layer._parameters.keys() - given:
                del layer._parameters[made]
            nbytes = sum(size for key, size in new.items() if key not in before)
            if nbytes:
                found[pattern(name)] = found.get(pattern(name), 0) + nbytes
    return found


def _tensors(layer: Any) -> Iterator[Tensor]:
    """All that a layer, or its backend, holds itself, but for single numbers."""
    backend = getattr(layer, "impl", None)
    for values in (layer._parameters, layer._buffers, vars(layer), vars(backend) if backend is not None else {}):
        yield from (value for value in values.values() if isinstance(value, Tensor) and value.ndim)


@contextlib.contextmanager
def _unquantized(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Show linear layers as they would be without quantization, on meta."""
    given: list[tuple[Any, Any, nn.Parameter]] = []
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, LinearBase) and weight is not None and weight.dtype == FP8:
            given.append((layer, layer.quant_method, weight))
            plain = torch.empty(weight.shape, dtype=dtype, device="meta")
            layer.quant_method = UnquantizedLinearMethod()
            layer._parameters["weight"] = nn.Parameter(plain, requires_grad=False)
    try:
        yield
    finally:
        for layer, method, weight in given:
            layer.quant_method, layer._parameters["weight"] = method, weight
