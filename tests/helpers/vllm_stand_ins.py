"""Stands in for what vLLM asks of its worker and of its kernels where models are loaded without either."""

from __future__ import annotations

import torch


def stand_in() -> None:
    """Call it before a model is loaded; where all is there, nothing changes."""
    import vllm._custom_ops  # noqa: F401  kernels are known from then on

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker does on a CPU
    if not hasattr(torch.ops._C, "convert_weight_packed"):  # experts are packed where there is AMX
        torch.ops._C.convert_weight_packed = lambda weight: weight
