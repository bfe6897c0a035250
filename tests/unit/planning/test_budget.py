"""Budgets of memory and threads: what a stream takes stays within them, and what can't be honoured is an error."""

from __future__ import annotations

import threading

import pytest
import torch

from helpers import one_tensor, random_weights
from octavo.errors import DeviceError
from octavo.numerics import schemes
from octavo.planning.budget import Budget
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.streaming.sinks import ParameterSink
from octavo.streaming.stream import Stream, Worker

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(60)]


@pytest.mark.parametrize("staging_bytes", [1 << 20, 3 << 20, 10 << 20, 256 << 20])
@pytest.mark.parametrize("threads", [None, 1, 16])
def test_the_staging_budget_holds_all_that_threads_own(checkpoint, staging_bytes, threads):
    for device in ("cpu", "cuda:0"):
        budget = Budget.fit(
            plan_checkpoint(checkpoint, Recipe(), staging_bytes, device).placements, staging_bytes, threads
        )
        assert budget.device == torch.device(device)
        assert budget.staging_bytes <= staging_bytes
        assert budget.threads == threads or (threads is None and budget.threads >= 1)
        assert budget.slot_bytes >= 1 << 12


def test_a_worker_takes_no_more_memory_than_its_budget_says(checkpoint):
    plan = plan_checkpoint(checkpoint, Recipe(), 2 << 20)
    stream = Stream(checkpoint, plan, ParameterSink({}), threads=1)
    made = []
    thread = threading.Thread(target=lambda: made.append(Worker(stream)))
    thread.start()
    thread.join()
    (worker,) = made
    owned = [worker.slot.buffer]
    held = (*vars(worker.press).values(), *vars(worker.press.tiles).values())
    owned += [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
    for_output = stream.budget.slot_bytes // 2  # taken when first needed
    assert sum(tensor.nbytes for tensor in owned) + for_output == stream.budget.host_bytes <= 2 << 20


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
@pytest.mark.parametrize("staging_bytes", [1 << 20, 3 << 20, 24 << 20, 100 << 20, 192 << 20, 256 << 20])
@pytest.mark.parametrize("threads", [None, 1, 40])
def test_what_an_accelerator_takes_is_within_the_budget(tmp_path, scheme, staging_bytes, threads):
    checkpoint = one_tensor(tmp_path, random_weights((64, 64), torch.bfloat16, 0))
    plan = plan_checkpoint(checkpoint, Recipe(scheme), staging_bytes, "cuda:0")
    for handing_out in (False, True):
        fit = Budget.fit(plan.placements, plan.staging_bytes, threads, handing_out=handing_out)
        assert fit.slots * fit.slot_bytes == fit.host_bytes <= staging_bytes
        assert fit.lanes * fit.lane_bytes == fit.device_bytes <= staging_bytes
        outstanding = fit.block_bytes if handing_out else 0
        assert fit.device_bytes + outstanding <= staging_bytes
        assert fit.block_bytes * 1.27 <= fit.lane_bytes
        assert not fit.block_bytes % fit.read_bytes  # no block ends with a small read


def test_a_budget_that_is_too_small_is_an_error(checkpoint):
    with pytest.raises(DeviceError, match=r"staging_bytes is 1,000; at least 1,048,576 \(1 MiB\) are needed"):
        plan_checkpoint(checkpoint, Recipe(), 1000)


def test_no_threads_are_an_error(checkpoint):
    with pytest.raises(DeviceError, match="threads is 0; at least 1 is needed"):
        Stream(checkpoint, plan_checkpoint(checkpoint, Recipe()), ParameterSink({}), threads=0)


def test_direct_reads_to_a_cpu_are_an_error(checkpoint):
    with pytest.raises(DeviceError, match="direct_io=True is for loading to an accelerator"):
        Stream(checkpoint, plan_checkpoint(checkpoint, Recipe()), ParameterSink({}), direct_io=True)
