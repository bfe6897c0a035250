"""Layers in NVFP4 of which vLLM joins several, brought to one global scale whenever it processes them.

Of joined linear layers it takes the largest of their divisors for all, and of gate and up of an expert that of gate;
where they differ, it only warns.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...conversion.packing import GLOBAL
from ..engine.global_scales import agree
from .telling import log

_SUFFIX = f"weight{GLOBAL}"


def follow(model: nn.Module) -> None:
    """Have layers agree before they are processed. To be called between loading and processing."""
    for path, layer in model.named_modules():
        names = [name for name in layer._parameters if name.endswith(_SUFFIX)]
        if names:
            _watch(layer, path, names)


def _watch(layer: Any, path: str, names: list[str]) -> None:
    method = layer.quant_method
    process = method.process_weights_after_loading

    def process_weights_after_loading(given: nn.Module) -> None:
        if given is layer:
            for name in names:
                _settle(layer, path, name)
        process(given)

    method.process_weights_after_loading = process_weights_after_loading


def _settle(layer: Any, path: str, name: str) -> None:
    divisors: Tensor = getattr(layer, name).data
    scales: Tensor = getattr(layer, name.replace(GLOBAL, "_scale")).data
    if divisors.ndim < scales.ndim - 1 or divisors.shape[-1] == 1:
        return  # of each matrix
    rows = getattr(layer, "logical_widths", None) or [scales.shape[-2] // divisors.shape[-1]] * divisors.shape[-1]
    if agree(scales, divisors, rows):
        log.warning(
            "octavo: %s joins matrices with different global scales (the largest weight of one is beyond 6.75), and "
            "vLLM takes one for all: scales of the smallest weights are rounded to that",
            path,
        )
