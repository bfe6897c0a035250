"""Twins of packed parameters, by the names of unquantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from octavo.adapters.engine.twins import twins


@pytest.mark.parametrize("called_so", [False, True])
def test_a_twin_is_there_meanwhile_also_where_the_packed_parameter_goes_by_its_name(called_so):
    """As SGLang's DeepSeek has it, for who asks a layer for its weight."""
    layer = nn.Module()
    layer.register_parameter("weight_packed", nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False))
    if called_so:
        layer.register_parameter("weight", layer.weight_packed)
    before = dict(layer._parameters)
    with twins(layer, ["weight_packed"], 2):
        assert dict(layer.named_parameters())["weight"].shape == (4, 16)
    assert layer._parameters == before


def test_what_has_that_name_and_is_another_parameter_stays():
    layer = nn.Module()
    layer.register_parameter("weight_packed", nn.Parameter(torch.zeros(4, 8, dtype=torch.uint8), requires_grad=False))
    layer.register_parameter("weight", nn.Parameter(torch.zeros(2)))
    with twins(layer, ["weight_packed"], 2):
        assert layer.weight.shape == (2,)
