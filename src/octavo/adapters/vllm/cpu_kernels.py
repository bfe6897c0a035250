"""Kernels for processors without units for FP8: linear layers and experts.

They are octavo's own weight-only products (`octavo.running.weight_only`): weights are widened to the dtype of the
activations some rows at a time, and activations are not quantized. Those of int8 are torch's where that is faster
(`octavo.running.int8`).

- int8 weights alone, for which vLLM has none.
- A scale a row: ahead of what vLLM makes of torch's ``_scaled_mm``, which takes a thousand times as long for a token.
- Blocks, and experts of either kind, for which vLLM's own need AMX: after those.

vLLM says in its log which kernel it selected, and its ``VLLM_DISABLED_KERNELS`` names those that it shall not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.pytorch import TorchFP8ScaledMMLinearKernel
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from ...conversion import packing
from ...running.linear import linear as product
from ...running.opaque import opaque
from ...running.weight_only import weight_only

_ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {MoEActivation.SILU: F.silu, MoEActivation.GELU: F.gelu}


def _fake(x: Tensor, q: Tensor, scale: Tensor, scheme: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], q.shape[0]))


# in one piece under torch.compile, which would unroll the loop over rows
@opaque("(Tensor x, Tensor q, Tensor scale, str scheme, Tensor? bias) -> Tensor", _fake, "cpu")
def product_on_cpu(x: Tensor, q: Tensor, scale: Tensor, scheme: str, bias: Tensor | None) -> Tensor:
    """``x[tokens, in] @ dequantize(q[out, in]).T + bias``."""
    return product(x, q, scale, scheme, None, bias)


class OctavoPackedLinear(linear.MPLinearKernel):  # type: ignore[misc]
    """x[tokens, in] times weight[out, in], int8 with a scale a row, four of which are one int32 of a checkpoint."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        fits = (c.weight_type, c.group_size, c.zero_points) == (scalar_types.uint8b128, -1, False)
        if not current_platform.is_cpu():
            return False, "is for CPUs"
        return (True, None) if fits else (False, "is for int8 with a scale a row, and without zero points")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._transform_param(layer, self.w_q_name, lambda words: packing.flip(words.data.view(torch.int8)))

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, scale, _ = self._get_weight_params(layer)
        return product_on_cpu(x, weight, scale.float(), "int8_channel", bias)


class OctavoChannelLinear(linear.FP8ScaledMMLinearKernel):  # type: ignore[misc]
    """x[tokens, in] times weight[out, in], e4m3 with a scale a row."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "is for CPUs")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        weight, activation = config.weight_quant_key.scale, config.activation_quant_key.scale
        fits = _scheme(weight.group_shape) == "fp8_channel" and not activation.static
        return (True, None) if fits else (False, "is for a scale a row of the weight, and activations without one")

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weight, scale, *_ = self._get_layer_params(layer)  # weight[in, out], a view of [out, in]
        return product_on_cpu(x, weight.t(), scale, "fp8_channel", bias)

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        raise NotImplementedError("apply_weights does it all")


class OctavoBlockLinear(linear.Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """x[tokens, in] times weight[out, in], e4m3 with scales of 128x128 blocks."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "is for CPUs")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        shape = config.weight_quant_key.scale.group_shape
        return (True, None) if (shape.row, shape.col) == (128, 128) else (False, "is for blocks of 128x128")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """They stay as they are in the checkpoint."""

    def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
        return product_on_cpu(A, B, Bs, "fp8_block", None)


class OctavoExperts(modular_kernel.FusedMoEExpertsModular):  # type: ignore[misc]
    """Experts one after another: w1[experts, 2 x intermediate, hidden], w2[experts, hidden, intermediate]."""

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> Any:
        return modular_kernel.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in _ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is not None and _scheme(weight_key.scale.group_shape) is not None

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *_: Any) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:
            raise NotImplementedError("router weights on the input: octavo's experts apply them to the output")
        scheme = "fp8_block" if self.quant_config.block_shape else "fp8_channel"
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            local = expert if expert_map is None else int(expert_map[expert])
            if local < 0:  # another rank's
                continue
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            x = hidden_states[token]
            up = weight_only(x, w1[local], self.w1_scale[local], scheme)
            gate, value = up.chunk(2, -1)
            inner = _ACTIVATIONS[activation](gate) * value
            y = weight_only(inner, w2[local], self.w2_scale[local], scheme)
            total.index_add_(0, token, y.float() * topk_weights[token, choice, None].float())
        output.copy_(total)


def _scheme(shape: Any) -> str | None:
    """The scheme whose scale groups have a shape, in vLLM's terms (-1: all)."""
    return {(128, 128): "fp8_block", (-1, 1): "fp8_channel", (1, -1): "fp8_channel"}.get((shape.row, shape.col))


def register() -> None:
    """Offer the kernels, on a CPU only. May be called repeatedly."""
    # `register_linear_kernel` appends, and has no list for block scales
    rows, blocks, packed = (
        kinds[PlatformEnum.CPU]
        for kinds in (linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_FP8_BLOCK_KERNELS, linear._POSSIBLE_KERNELS)
    )
    if OctavoPackedLinear not in packed:
        packed.append(OctavoPackedLinear)
    if OctavoChannelLinear not in rows:
        slow = [number for number, kernel in enumerate(rows) if issubclass(kernel, TorchFP8ScaledMMLinearKernel)]
        rows.insert(min(slow, default=len(rows)), OctavoChannelLinear)
    if OctavoBlockLinear not in blocks:
        blocks.append(OctavoBlockLinear)
    # nor is there a registry of experts: Triton's is the backend whose weights are those of the checkpoint
    if not hasattr(oracle.backend_to_kernel_cls, "without_octavo"):
        oracle.backend_to_kernel_cls = _offering(oracle.backend_to_kernel_cls)


def _offering(backend_to_kernel_cls: Any) -> Any:
    def offering(backend: Any) -> list[Any]:
        found = list(backend_to_kernel_cls(backend))
        return [*found, OctavoExperts] if backend == oracle.Fp8MoeBackend.TRITON else found

    offering.without_octavo = backend_to_kernel_cls  # type: ignore[attr-defined]
    return offering
