"""What loaders compute of weights, once all are there."""

from __future__ import annotations

import torch
from torch import nn

from octavo.adapters.sglang.computed import Computed


class Language(nn.Module):
    """Computes a product for each layer that it is told of, or for all, as DeepSeek's does."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(2) for _ in range(3))
        self.made: dict[int, torch.Tensor] = {}
        self.calls: list[bool] = []

    def load_weights(self, weights):
        names = []
        for name, weight in weights:
            self.weights[int(name)].data.copy_(weight)
            names.append(name)
        self.post_load_weights(True, weight_names=names)

    def post_load_weights(self, is_next=False, weight_names=None):
        self.calls.append(is_next)
        for name in range(3) if weight_names is None else map(int, weight_names):
            self.made[name] = self.weights[name].data * 2


class Tower(nn.Module):
    """Hands weights on to a part that computes."""

    def __init__(self):
        super().__init__()
        self.language = Language()

    def load_weights(self, weights):
        self.language.load_weights(weights)


def test_what_a_part_computes_is_computed_once_for_all_layers():
    model = Tower()
    computed = Computed(model)
    for some in (["0", "1", "2"], ["1"]):  # dry, and what does not stream to its place
        with computed.noted():
            model.load_weights((name, torch.ones(2)) for name in some)
    assert not model.language.calls
    assert not model.language.made
    computed.compute()
    assert model.language.calls == [True]
    assert {name: made.tolist() for name, made in model.language.made.items()} == {
        number: [2.0, 2.0] for number in range(3)
    }
    assert "post_load_weights" not in vars(model.language)


def test_what_a_loader_does_not_call_is_not_computed():
    model = Tower()
    computed = Computed(model)
    with computed.noted():
        pass
    computed.compute()
    assert not model.language.calls
