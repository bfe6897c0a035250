"""A part of a matrix that is padding alone: nothing of the weight goes there, and its scales do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import write_checkpoint
from octavo.adapters.engine.placing import split
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.elements.dry_run import Source, trace
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe


class Part(nn.Module):
    """The columns of a rank, of 64; the matrix has as many as the first rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.zeros(32, 1), requires_grad=False)
        self._rank = rank

    def load_weights(self, weights):
        for name, tensor in weights:
            if name.endswith("_scale"):
                self.weight_scale.data.copy_(tensor)
            elif self._rank:
                self.weight.data.zero_()
            else:
                self.weight.data.copy_(tensor)


@pytest.mark.parametrize(("rank", "direct", "rest"), [(0, 1, 0), (1, 0, 1)])
def test_scales_of_a_part_that_is_padding_alone_come_by_the_loader(rank, direct, rest, tmp_path):
    folder = write_checkpoint(
        tmp_path / "model", {"q_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16)}, config={}
    )
    plan = plan_checkpoint(Checkpoint.open(folder), Recipe("fp8_channel"))
    given = [
        Source("q_proj.weight", (32, 64), torch.float8_e4m3fn),
        Source("q_proj.weight_scale", (32, 1), torch.float32),
    ]
    model = Part(rank)
    places = split(model, trace(model, model.load_weights, given), plan, formats.get("compressed-tensors"))
    assert (len(places.direct.placements), len(places.rest.placements)) == (direct, rest)
