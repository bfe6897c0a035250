"""Reference kernels, for processors for which vLLM has none: block-scaled linear layers, and experts, in FP8.

vLLM's own need AMX. These widen the weights to the dtype of the activations before each multiplication: right, slow,
and enough for tests and for trying things out on a laptop. They are offered last, so that vLLM prefers whatever it has
itself. (For fp8_channel, its linear layers run on any processor.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle import fp8 as oracle
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import PlatformEnum, current_platform

from ...numerics import schemes

_ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {MoEActivation.SILU: F.silu, MoEActivation.GELU: F.gelu}


class ReferenceBlockLinear(linear.Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
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
        return F.linear(A, schemes.dequantize(B, Bs, "fp8_block", dtype=A.dtype))


class ReferenceExperts(modular_kernel.FusedMoEExpertsModular):  # type: ignore[misc]
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
            raise NotImplementedError(
                "router weights on the input: octavo's reference experts apply them to the output"
            )
        scheme = "fp8_block" if self.quant_config.block_shape else "fp8_channel"
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in sorted(set(topk_ids.flatten().tolist())):
            local = expert if expert_map is None else int(expert_map[expert])
            if local < 0:  # another rank's
                continue
            token, choice = (topk_ids == expert).nonzero(as_tuple=True)
            x = hidden_states[token]
            up = F.linear(x, schemes.dequantize(w1[local], self.w1_scale[local], scheme, dtype=x.dtype))
            gate, value = up.chunk(2, -1)
            inner = _ACTIVATIONS[activation](gate) * value
            y = F.linear(inner, schemes.dequantize(w2[local], self.w2_scale[local], scheme, dtype=x.dtype))
            total.index_add_(0, token, y.float() * topk_weights[token, choice, None].float())
        output.copy_(total)


def _scheme(shape: Any) -> str | None:
    """The scheme whose scale groups have a shape, in vLLM's terms (-1: all)."""
    return {(128, 128): "fp8_block", (-1, 1): "fp8_channel", (1, -1): "fp8_channel"}.get((shape.row, shape.col))


def register() -> None:
    """Offer the kernels, on a CPU only, after vLLM's own. May be called repeatedly."""
    # `register_linear_kernel` has no list for block scales
    kernels = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if ReferenceBlockLinear not in kernels:
        kernels.append(ReferenceBlockLinear)
    # nor is there a registry of experts: Triton's is the backend whose weights are those of the checkpoint
    if not hasattr(oracle.backend_to_kernel_cls, "without_octavo"):
        oracle.backend_to_kernel_cls = _offering_reference(oracle.backend_to_kernel_cls)


def _offering_reference(backend_to_kernel_cls: Any) -> Any:
    def offering(backend: Any) -> list[Any]:
        found = list(backend_to_kernel_cls(backend))
        return [*found, ReferenceExperts] if backend == oracle.Fp8MoeBackend.TRITON else found

    offering.without_octavo = backend_to_kernel_cls  # type: ignore[attr-defined]
    return offering
