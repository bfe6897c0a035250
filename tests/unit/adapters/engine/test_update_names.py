"""Names by which trainers send tensors to an engine: without those of wrappers, where the checkpoint knows the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.adapters.engine.updating import Weights

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (UP, UP),
        (f"_orig_mod.{UP}", UP),
        (f"module.{UP}", UP),
        (f"base_model.model.{UP}".replace("up_proj.", "up_proj.base_layer."), UP),
        (UP.replace("mlp.", "_fsdp_wrapped_module.mlp."), UP),
        ("module.strange", "module.strange"),
        (f"other.{UP}", f"other.{UP}"),
    ],
)
def test_wrappers_are_left_out_of_what_the_checkpoint_knows(sent: str, named: str) -> None:
    nothing: Any = None
    weights = Weights({UP: nothing}, nothing, nothing, nothing, nothing, nothing)
    tensor = torch.ones(1)
    assert list(weights._named([(sent, tensor)])) == [(named, tensor)]
