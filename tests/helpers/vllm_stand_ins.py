"""Stands in for what vLLM asks of its worker and of its kernels where models are loaded without either."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def stand_in() -> None:
    """Call it before a model is loaded; where all is there, nothing changes."""
    import vllm._custom_ops  # noqa: F401  kernels are known from then on

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker does on a CPU
    if not hasattr(torch.ops._C, "convert_weight_packed"):  # experts are packed where there is AMX
        torch.ops._C.convert_weight_packed = lambda weight: weight


class _NoKernel:
    """In the place of a kernel that takes parameters as they are."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Whatever it is told of the layer."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay nothing out."""

    @property
    def fused_experts(self) -> _NoKernel:
        return self


def without_kernels() -> None:
    """From now on, layers are made for kernels of int8 and NVFP4 that are not there: parameters keep their layout."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as nvfp4_experts,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as int8_experts,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as packed_experts,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as nvfp4_linear,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_int8 as int8_linear,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as packed_linear,
    )

    nvfp4_linear.init_nvfp4_linear_kernel = lambda use_a16: _NoKernel()
    if hasattr(nvfp4_linear, "expose_input_quant_key"):
        nvfp4_linear.expose_input_quant_key = lambda layer, kernel: None
    int8_linear.init_int8_linear_kernel = lambda **_: _NoKernel()
    nvfp4_experts.select_nvfp4_moe_backend = lambda **_: (None, lambda **_: None)
    nvfp4_experts.is_global_sf_supported_for_nvfp4_backend = lambda _: False
    nvfp4_experts.convert_to_nvfp4_moe_kernel_format = _as_they_are
    nvfp4_experts.make_nvfp4_moe_quant_config = lambda **_: None
    nvfp4_experts.make_nvfp4_moe_kernel = lambda **_: _NoKernel()
    int8_experts.select_int8_moe_backend = lambda **_: (None, object)
    int8_experts.CompressedTensorsW8A8Int8MoEMethod.process_weights_after_loading = lambda self, layer: None
    packed_linear.choose_mp_linear_kernel = lambda _: _NoKernel
    packed_experts.select_wna16_moe_backend = lambda **_: (packed_experts.WNA16MoEBackend.MARLIN, object)
    packed_experts.check_moe_marlin_supports_config = lambda *_, **__: True
    packed_experts.CompressedTensorsWNA16MoEMethod.process_weights_after_loading = lambda self, layer: None
    with contextlib.suppress(ImportError):  # which 0.24 has, for Marlin alone
        _without_marlin()


def _without_marlin() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16_marlin as experts,
    )

    compressed_tensors_moe.check_moe_marlin_supports_layer = lambda *_: True
    experts.select_wna16_moe_backend = lambda **_: (experts.WNA16MoEBackend.MARLIN, object)
    experts.CompressedTensorsWNA16MarlinMoEMethod.process_weights_after_loading = lambda self, layer: None


def _as_they_are(**given: Any) -> tuple[Any, ...]:
    names = ("w13", "w13_scale", "w13_scale_2", "a13_scale", "w2", "w2_scale", "w2_scale_2", "a2_scale")
    return tuple(given[name] for name in names)
