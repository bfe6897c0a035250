"""The tensor that a loader does not take is found, in whatever order it loads what it is given."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.vllm_toys import empty
from octavo.adapters.engine.culprits import trace_to_culprit
from octavo.elements.dry_run import Source


class Model(torch.nn.Module):
    """Takes every tensor but one, and says so in one way or another."""

    def __init__(self, order, error):
        super().__init__()
        self.table, self.order, self.error = empty(4), order, error

    def load_weights(self, weights):
        for name, weight in self.order(weights):
            if name == "layers.1.odd.weight":
                raise self.error
            self.table.data.copy_(weight)


def as_they_come(weights):
    return weights


def all_at_once(weights):
    return list(weights)


def backwards(weights):
    return reversed(list(weights))


def late(weights):
    """What is for one part of the model waits until the other is loaded."""
    waiting = []
    for name, weight in weights:
        if name.startswith("layers.1"):
            waiting.append((name, weight))
        else:
            yield name, weight
    yield from waiting


def by_layer(weights):
    """A layer is loaded when all of it has come, which the next one shows."""
    for _, group in itertools.groupby(weights, key=lambda pair: pair[0].split(".")[1]):
        yield from list(group)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what is this?"),
        KeyError("layers.1.odd.weight"),
        KeyError("layers.0.a.weight"),
        KeyError("fused.w13"),
    ],
)
@pytest.mark.parametrize("order", [as_they_come, all_at_once, backwards, late, by_layer])
def test_the_right_tensor_is_blamed(order, error):
    names = [f"layers.{layer}.{leaf}.weight" for layer in range(4) for leaf in ("a", "b", "odd", "z")]
    model = Model(order, error)
    seen = trace_to_culprit(model, model.load_weights, [Source(name, (4,), torch.bfloat16) for name in names])
    assert seen.failed == ("layers.1.odd.weight", error)


def test_a_loader_that_fails_without_any_tensor_blames_none():
    def load(weights):
        raise ValueError("not today")

    assert trace_to_culprit(Model(as_they_come, None), load, [Source("a", (4,), torch.bfloat16)]).failed[0] == ""
