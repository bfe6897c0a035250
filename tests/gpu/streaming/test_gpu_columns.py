"""A rank's columns on a CUDA device: the bytes of the whole, within the staging budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers import DTYPES, random_weights, same_bytes, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.symbolic import Symbolic
from octavo.numerics import nvfp4, schemes
from octavo.planning import kinds
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe
from octavo.streaming.sinks import ParameterSink, Storage
from octavo.streaming.stream import Stream

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"


def columns_of(folder, tensors, columns, scheme, staging_bytes):
    """A checkpoint of some matrices, and a plan to have these columns of their stack on the device."""
    checkpoint = Checkpoint.open(write_checkpoint(folder, tensors))
    symbols = [Symbolic.source(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    stack = torch.stack(symbols)
    target = Target("p", tuple(stack.shape), None, kinds.EXPERTS, tuple(stack.pieces), DEVICE)
    plan = make_plan(checkpoint, [target], Recipe(scheme), staging_bytes)
    placement = dataclasses.replace(plan.placements[0], columns=columns)
    return checkpoint, dataclasses.replace(plan, placements=(placement,))


def stored_columns(q, scheme, start, stop):
    """What is stored of some columns: of nvfp4, numbers and then their scales."""
    if scheme != "nvfp4":
        return q[..., start:stop]
    codes, scales = nvfp4.Packed.of(q)
    of_groups = scales[..., start // nvfp4.GROUP : stop // nvfp4.GROUP].view(torch.uint8)
    return torch.cat((codes[..., start // 2 : stop // 2], of_groups), -1)


@pytest.mark.parametrize("scheme", [*schemes.SCHEMES, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(0, 704), (704, 1408), (100, 333)])
@pytest.mark.parametrize("staging_bytes", [1 << 20, 256 << 20])
def test_columns_on_a_gpu_are_those_of_the_whole_on_a_cpu(scheme, dtype, columns, staging_bytes, tmp_path):
    if scheme == "nvfp4":  # whose groups of columns stay whole
        columns = tuple(column // nvfp4.GROUP * nvfp4.GROUP for column in columns)
    tensors = {f"{n}.down_proj.weight": random_weights((300, 1408), dtype, n, "sparse") for n in range(5)}
    checkpoint, plan = columns_of(tmp_path, tensors, columns, scheme, staging_bytes)
    storage = Storage.allocate(plan.placements[0])
    tally = Stream(checkpoint, plan, ParameterSink({"p": storage})).run()
    assert tally.placed_bytes == plan.final_bytes()
    start, stop = columns
    whole = torch.stack(list(tensors.values()))
    if scheme is None:
        assert same_bytes(storage.weight.cpu(), whole[..., start:stop])
        return
    q, scale = schemes.quantize(whole, scheme)
    assert same_bytes(storage.weight.cpu(), stored_columns(q, scheme, start, stop))
    group = schemes.get(scheme).group_cols
    wanted = scale if group is None else scale[..., start // group : -(-stop // group)]
    assert same_bytes(storage.scale.cpu(), wanted)


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_columns_take_no_more_than_the_staging_budget(scheme, tmp_path):
    tensors = {f"{n}.down_proj.weight": random_weights((2048, 4096), torch.bfloat16, n) for n in range(6)}
    staging_bytes = 64 << 20
    checkpoint, plan = columns_of(tmp_path, tensors, (2048, 4096), scheme, staging_bytes)
    sink = ParameterSink({"p": Storage.allocate(plan.placements[0])})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Stream(checkpoint, plan, sink).run()
    assert torch.cuda.max_memory_allocated() - before <= staging_bytes + (1 << 20)
