"""What loads layer by layer must leave: the definition's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo import schemes

from . import same_bytes
from .engine import Model


def one_linear(out: int, inputs: int = 64) -> Any:
    """A model of one matrix, ``a.weight``: bf16[out, inputs]."""
    return nn.ModuleDict({"a": nn.Linear(inputs, out, bias=False, dtype=torch.bfloat16)})


def loaded_plainly(model: Model, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What the model's own loader makes of the pairs, in high precision."""
    model.load_weights(pairs)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_quantized(layer: nn.Module, weight: Tensor, scheme: str, parts: Sequence[int] | None = None) -> None:
    """The layer holds exactly what quantizing the weight whole gives."""
    q, scale = schemes.quantize(weight, scheme, parts)
    assert same_bytes(layer.weight.data, q), scheme
    assert same_bytes(layer.weight_scale.data, scale), scheme


def assert_quantized_like(
    model: nn.Module, reference: Mapping[str, Tensor], parts: Mapping[str, Sequence[int]], scheme: str
) -> None:
    """The model holds ``reference``; of the names in ``parts``, what quantizing each whole gives."""
    found = dict(model.named_parameters())
    assert parts
    for name, tensor in reference.items():
        if name not in parts:
            assert same_bytes(found[name].data, tensor), name
            continue
        q, scale = schemes.quantize(tensor, scheme, parts[name])
        assert same_bytes(found[name].data, q), name
        assert same_bytes(found[f"{name}_scale"].data, scale), name
