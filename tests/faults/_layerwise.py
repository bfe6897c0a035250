"""Small models that load themselves, pairs to load them with, and edits of those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from helpers.engine import Model, Shape, checkpoint
from helpers.layerwise import assert_quantized
from octavo.session import Session

SMALL = Shape(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=16, experts=2, vocab=32)
K = "layers.1.self_attn.k_proj.weight"
UP = "layers.0.mlp.up_proj.weight"
EXPERT = "layers.1.mlp.experts.1.up_proj.weight"
Pairs = list[tuple[str, Tensor]]

DENSE = list(checkpoint(SMALL).items())
MOE = list(checkpoint(SMALL, moe=True).items())


# -- whole models -----------------------------------------------------------------------------------------------------


def load(pairs: Pairs, *, moe: bool = False, **options: Any) -> tuple[Model, Session]:
    model = Model(SMALL, moe=moe)
    session = Session(model, **options)
    with session:
        model.load_weights(iter(pairs))
    return model, session


def without(pairs: Pairs, *names: str) -> Pairs:
    return [(name, tensor) for name, tensor in pairs if name not in names]


def nonfinite(pairs: Pairs, name: str) -> Pairs:
    return [(n, torch.where(torch.arange(t.shape[-1]) == 3, torch.inf, t) if n == name else t) for n, t in pairs]


# -- one matrix or two, 64 wide ---------------------------------------------------------------------------------------


def linears(names: str = "ab") -> Any:
    return nn.ModuleDict({name: nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for name in names})


def weights(seed: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 64, generator=generator).mul(10**i).bfloat16() for i in range(count)]


def staged(weight: Tensor, tensors: list[Tensor]) -> None:
    staging = torch.empty(128, 64, dtype=torch.bfloat16)
    for at, tensor in enumerate(tensors):
        staging[64 * at : 64 * at + 64].copy_(tensor)
    weight.copy_(staging)


def assert_channel(layer: nn.Module, weight: Tensor) -> None:
    assert_quantized(layer, weight, "fp8_channel")
