"""A model of linear layers and experts that are quantized, without memory."""

from __future__ import annotations

import torch
from torch import nn

from octavo.running import modules


class Stacks(nn.Module):
    """A model's experts, as transformers has them."""

    has_gate, is_transposed, has_bias = True, False, False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(4, 64, 48, dtype=torch.bfloat16, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(4, 48, 32, dtype=torch.bfloat16, device="meta"))


def small_model(scheme: str = "fp8_channel", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    shapes = ((48, 96, True), (96, 48, False), (48, 96, True), (48, 8, False))
    layers = [nn.Linear(k, n, bias, dtype=dtype, device="meta") for k, n, bias in shapes]
    model = nn.Sequential(*layers, Stacks())
    for number in range(3):
        modules.quantize_linear(model, str(number), scheme, (model[number].out_features,))
    modules.quantize_stack(model[4], "gate_up_proj", scheme, (4, 64, 48), (32, 32))
    modules.quantize_stack(model[4], "down_proj", scheme, (4, 48, 32), (48,))
    return model
