"""Names by which trainers send tensors to an engine: without those of wrappers, where the rest is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import write_checkpoint
from octavo.adapters.engine.updating import Weights
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (UP, UP),
        (f"_orig_mod.{UP}", UP),
        (f"module.{UP}", UP),
        (f"base_model.model.{UP}".replace("up_proj.", "up_proj.base_layer."), UP),
        (UP.replace("mlp.", "_fsdp_wrapped_module.mlp."), UP),
        (f"_orig_mod.{UP}_scale_inv", f"{UP}_scale_inv"),
        (f"module.{UP}_packed", f"{UP}_packed"),
        (f"module.{UP}_shape", f"{UP}_shape"),
        ("module.strange", "module.strange"),
        (f"module.strange.{UP}_packed", f"module.strange.{UP}_packed"),
        (f"other.{UP}", f"other.{UP}"),
    ],
)
def test_wrappers_are_left_out_of_what_the_checkpoint_knows(sent: str, named: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {UP: torch.ones(8, 16, dtype=torch.bfloat16)}))
    plan, layout = plan_checkpoint(checkpoint, Recipe("int8_channel")), formats.get("compressed-tensors")
    nothing: Any = None
    weights = Weights(checkpoint.tensors, plan, layout, nothing, nothing, nothing)
    tensor = torch.ones(1)
    assert list(weights._named([(sent, tensor)])) == [(named, tensor)]
