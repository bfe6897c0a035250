"""What a stream allocates on an accelerator, counted on tensors without data: staging, and what kernels need beside it.

Not counted is what kernels take without asking torch for a tensor; the tests for GPUs measure all.
"""

from __future__ import annotations

import dataclasses
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from helpers import SCHEMES, headers
from octavo.elements.symbolic import Symbolic
from octavo.planning import kinds
from octavo.planning.blocks import cut_blocks, cut_reads
from octavo.planning.budget import Budget
from octavo.planning.placement import Target
from octavo.planning.plan import Plan, make_plan
from octavo.planning.recipe import Recipe
from octavo.streaming.on_accelerator import DevicePress
from octavo.streaming.placed import Placed
from octavo.streaming.ring import Ring, Slot
from octavo.streaming.sinks import ParameterSink, Storage

META = torch.device("meta")
#: of each lane, for the largest amax of its blocks
WATCHED_BYTES = 4 * 4096


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, kinds_of: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._alive.add(leaf)
        held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self._alive}
        self.peak_bytes = max(self.peak_bytes, sum(held.values()))
        return result


def targets(layout: str, dtype: str) -> tuple[Any, list[Target]]:
    """Some 400 MB, as matrices, as one stack, as the matrices that make a stack, or as a transposed stack."""
    if layout == "matrices":
        checkpoint = headers({f"layers.{i}.up_proj.weight": (4096, 4096) for i in range(12)}, dtype)
        sources = [Symbolic.source(i.name, i.shape, i.dtype) for i in checkpoint.tensors.values()]
        return checkpoint, [
            Target(info.name, tuple(source.shape), None, kinds.LINEAR, tuple(source.pieces))
            for info, source in zip(checkpoint.tensors.values(), sources, strict=True)
        ]
    if layout == "experts":
        checkpoint = headers({f"experts.{i}.down_proj.weight": (2048, 768) for i in range(128)}, dtype)
        sources = [Symbolic.source(i.name, i.shape, i.dtype) for i in checkpoint.tensors.values()]
        made = torch.stack(sources)
    else:
        checkpoint = headers({"stack": (12, 4096, 4096)}, dtype)
        (info,) = checkpoint.tensors.values()
        made = Symbolic.source(info.name, info.shape, info.dtype)
    transposed = layout == "transposed"
    return checkpoint, [
        Target("stack", tuple(made.shape), None, kinds.EXPERTS, tuple(made.pieces), transposed=transposed)
    ]


def peak_of(checkpoint: Any, plan: Plan, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that a whole stream of a plan allocates on a device without streams, and without values."""
    monkeypatch.setattr(torch, "meta", types.SimpleNamespace(), raising=False)
    storages = {p.name: Storage.allocate(dataclasses.replace(p, device="meta")) for p in plan.placements}
    slot = Slot(16, pinned=False)
    slot.buffer = torch.empty(budget.slot_bytes, dtype=torch.uint8, device=META)
    placed = 0
    with Allocations() as allocations:
        press = DevicePress(checkpoint, budget, Placed(ParameterSink(storages), Ring(1)))
        for read in cut_reads(cut_blocks(plan.placements, checkpoint.tensors, budget.block_bytes), budget.read_bytes):
            placed += press.take(read, slot)
    assert placed == plan.final_bytes()
    return allocations.peak_bytes


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("layout", ["matrices", "experts", "stack", "transposed"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lanes_and_all_that_quantizing_takes_are_within_what_a_budget_says(scheme, layout, dtype, monkeypatch):
    staging_bytes = 256 << 20
    checkpoint, wanted = targets(layout, dtype)
    plan = make_plan(checkpoint, wanted, Recipe(scheme), staging_bytes)
    assert len(plan.quantized) == len(wanted)
    budget = Budget.on_accelerator(META, staging_bytes, 16)
    peak_bytes = peak_of(checkpoint, plan, budget, monkeypatch)
    assert budget.lanes * budget.block_bytes < peak_bytes
    # both lanes may have what kernels need beside a block; that of one is free before the other takes its own
    assert peak_bytes <= budget.block_bytes + budget.lane_bytes + budget.lanes * WATCHED_BYTES
