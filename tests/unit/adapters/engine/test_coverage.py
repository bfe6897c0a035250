"""Tensors of another size than others of their kind, which a loader cuts or pads without a word."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers import write_checkpoint
from octavo.adapters.engine.coverage import coverage
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.dry_run import Source, trace
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe

ROWS, COLS = 8, 4


class Model(nn.Module):
    def __init__(self, layers: int, ranks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(COLS, ROWS // ranks, bias=False) for _ in range(layers))
        self._rank = 0

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """As engines do: the part of this rank, of whatever there is; what is too little is padded."""
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameter = parameters[name]
            part = weight.narrow(0, 0, min(len(parameter), len(weight)))
            parameter.data[: len(part)].copy_(part)
            parameter.data[len(part) :].zero_()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((8, 8, 8), None),
        ((8, 10, 8), "layers.1.weight has the shape [10, 4], where layers.0.weight has [8, 4]: the rest would be left"),
        ((3, 8, 8), "layers.0.weight has the shape [3, 4], where layers.1.weight has [8, 4]: constants would fill"),
        ((10, 10, 10), None),  # of which nothing says that it is wrong
    ],
)
def test_a_tensor_that_is_not_of_the_size_of_its_kind_is_named(rows, told, ranks, tmp_path):
    tensors = {f"layers.{number}.weight": torch.zeros(count, COLS) for number, count in enumerate(rows)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", tensors, config={}))
    plan = plan_checkpoint(checkpoint, Recipe(None))
    model = Model(len(rows), ranks)
    given = [Source(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    problems = coverage(model, trace(model, model.load_weights, given), plan, ())
    assert [told in problem for problem in problems] == ([True] if told else [])
