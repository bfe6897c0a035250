"""Views of parameters, in toys of vLLM's layers: what a reload does to them when processing packs the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from octavo.adapters.engine import derived


class Method:
    def __init__(self, pack: Callable[[Tensor], Tensor]) -> None:
        self.pack = pack

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data = self.pack(layer.weight.data)


class Convolution(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 1, 3), requires_grad=False)
        self.quant_method = Method(pack)


class Mixer(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = Convolution(pack)
        self.register_buffer("view", self.conv.weight.data.view(4, 3), persistent=False)
        self.rows = self.conv.weight.data[2:, 0, 1]
        self.table = torch.arange(4)


def load(layer: Convolution, first: float) -> Tensor:
    values = torch.arange(12.0).reshape(4, 1, 3) + first
    layer.weight.data.copy_(values)
    layer.quant_method.process_weights_after_loading(layer)
    return values


def reload(layer: Convolution, first: float) -> Tensor:
    """As vLLM does: a parameter made anew, processed, and copied to where the old one is."""
    kept = layer.weight
    layer.weight = nn.Parameter(torch.empty(4, 1, 3), requires_grad=False)
    values = load(layer, first)
    kept.data.copy_(layer.weight.data)
    layer.weight = kept
    return values


@pytest.mark.parametrize("pack", [lambda w: w.flip(0).clone(), lambda w: w], ids=["packed", "as they are"])
def test_views_show_what_was_loaded_last(pack: Callable[[Tensor], Tensor]) -> None:
    model = Mixer(pack)
    derived.follow(model)
    view, rows = model.view, model.rows
    for bring, first in ((load, 1), (reload, 100), (reload, 7)):
        values = bring(model.conv, first)
        assert torch.equal(view, values[:, 0])
        assert torch.equal(rows, values[2:, 0, 1])
    assert model.view is view
    assert torch.equal(model.conv.weight, pack(values))
    assert torch.equal(model.table, torch.arange(4))
