"""What loads layer by layer must leave: the definition's bytes, in layers that were finished at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octavo.numerics import schemes
from octavo.session.report import Event

from . import same_bytes
from .engine import Model, Shape

# sides above 128 that 128 doesn't divide
WIDE = Shape(hidden=160, inner=208, heads=8, kv_heads=4, head_dim=24, experts=4)


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


def assert_finished_at_once(events: list[Event]) -> None:
    """After a layer's last write comes its finish, before any other layer is touched; once, and nothing after it."""
    finished = []
    for index, event in enumerate(events):
        if event.kind == "finish":
            finished.append(event.layer)
            assert not any(later.layer == event.layer for later in events[index + 1 :])
            last_write = max((i for i, e in enumerate(events[:index]) if e.layer == event.layer), default=index)
            # whatever lies between belongs to the layer itself
            assert {e.layer for e in events[last_write:index]} <= {event.layer}
    assert len(finished) == len(set(finished))
    assert {event.layer for event in events} == set(finished)
