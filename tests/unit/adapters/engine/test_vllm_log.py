"""What the log of a load says of bytes, by plans of a few tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.adapters.engine.log import outcome, warning
from octavo.adapters.engine.placing import Places
from octavo.adapters.engine.survey import Survey
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe


@pytest.fixture
def surveyed(tmp_path: Any) -> Any:
    """What a survey finds where all tensors are read: of names and shapes, in bf16."""

    def make(shapes: dict[str, tuple[int, ...]], **recipe: Any) -> Survey:
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        plan = plan_checkpoint(Checkpoint.open(tmp_path), Recipe(**recipe), 1 << 22, "cpu")
        return Survey(plan, Places(plan, {}, plan_of_nothing(plan)), layers=len(plan.quantized))

    return make


def plan_of_nothing(plan: Any) -> Any:
    return dataclasses.replace(plan, placements=())


LINEAR = {"layers.0.down_proj.weight": (512, 512), "norm.weight": (512,), "lm_head.weight": (1024, 512)}


def test_bytes_are_those_of_each_kind(surveyed: Any) -> None:
    became, stayed = outcome(surveyed(LINEAR))
    assert became.startswith("1 layers (1 tensors) became fp8_channel, 258.00 KiB; of all, 1.50 MiB -> 1.25 MiB")
    assert stayed.startswith(
        "stayed as they were, 1.00 MiB: 1 output head, kept by default (1.00 MiB); 1 norm (1.00 KiB)"
    )


def test_what_users_or_kinds_keep_is_no_reason_to_warn(surveyed: Any) -> None:
    assert warning(surveyed(LINEAR)) is None
    ignored = {**LINEAR, "layers.0.up_proj.weight": (2048, 512)}
    assert warning(surveyed(ignored, ignore=["*.up_proj"])) is None


def test_a_tenth_that_stays_for_other_reasons_is_warned_of(surveyed: Any) -> None:
    said = warning(surveyed({**LINEAR, "conv.weight": (512, 128, 3)}))
    assert said is not None
    assert "384.00 KiB of 1.88 MiB stays unquantized" in said
    assert "3-D, no expert stack" in said
    assert warning(surveyed({**LINEAR, "conv.weight": (16, 128, 3)})) is None


def test_nothing_in_fp8_is_warned_of(surveyed: Any) -> None:
    found = surveyed({"norm.weight": (512,), "conv.weight": (512, 128, 3)})
    assert outcome(found)[0] == "no tensor became fp8_channel"
    assert "nothing in fp8_channel: all stays unquantized" in str(warning(found))
