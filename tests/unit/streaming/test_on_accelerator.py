"""What the accelerator path does beside streaming, as far as a CPU can show it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import in_blocks, random_weights, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.symbolic import Symbolic
from octavo.errors import DeviceError
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe
from octavo.streaming.nonfinite import describe_nonfinite
from octavo.streaming.on_accelerator import WarmUp, rehearse
from octavo.streaming.sinks import ParameterSink, Storage
from octavo.streaming.stream import Stream


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_rehearsal_goes_well_while_a_model_is_built(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of all threads, as transformers and vLLM do
    try:
        rehearse(torch.device("cpu"), schemes.SCHEMES)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_fails_the_warm_up_when_it_is_left():
    warm_up, done = WarmUp(torch.device("cuda", 0), 64 << 20, 2, ["fp8_channel"]), []
    with pytest.raises(DeviceError, match="can't be used here"), warm_up:
        done.append("the body")
    assert done == ["the body"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_beside_a_failed_warm_up_is_the_one_that_is_raised():
    with pytest.raises(KeyError, match="of the body"), WarmUp(torch.device("cuda", 0), 64 << 20, 2, []):
        raise KeyError("of the body")


def test_what_only_the_device_has_seen_is_said_with_the_names_of_tensors(tmp_path):
    tensors = {name: random_weights((8, 8), torch.bfloat16, 0) for name in "ab"}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    symbols = [Symbolic.source(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    plan = make_plan(
        checkpoint, [Target("p", (2, 8, 8), None, kinds.EXPERTS, tuple(torch.stack(symbols).pieces))], Recipe()
    )
    said = describe_nonfinite(checkpoint, [(plan.placements[0], piece) for piece in plan.placements[0].pieces])
    assert "the device saw a number that is not finite in tensor 'a' and 1 more" in said


class Counter(TorchDispatchMode):
    """Counts operations that an accelerator is given, which views are not."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", [*schemes.SCHEMES, None])
def test_columns_take_no_operation_more_than_the_whole(tmp_path, scheme):
    tensors = {f"{number}.weight": random_weights((128, 512), torch.bfloat16, number) for number in range(3)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    symbols = [Symbolic.source(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    target = Target("p", (3, 128, 512), None, kinds.EXPERTS, tuple(torch.stack(symbols).pieces))
    whole = make_plan(checkpoint, [target], Recipe(scheme))
    counts = {}
    for columns in (None, (256, 512)):
        placement = dataclasses.replace(whole.placements[0], columns=columns)
        plan = dataclasses.replace(whole, placements=(placement,))
        budget = in_blocks(plan, block_bytes=1 << 20)
        sink = ParameterSink({"p": Storage.allocate(placement)})
        with Counter() as counter:
            Stream(checkpoint, plan, sink, budget=budget).run()
        counts[columns] = counter.count
    assert 0 < counts[256, 512] <= counts[None]  # the first may make constants, too
