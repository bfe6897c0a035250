"""Which kernels are compiled before a forward asks for them, and by whom."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from helpers.experts import small_model
from octavo.running import ahead

BF16 = torch.bfloat16


def test_each_product_of_a_model_is_told_once_and_what_stays_unquantized_is_none(monkeypatch):
    monkeypatch.setattr(ahead.fp8, "HAS_TRITON", True)
    found = ahead.products_of(small_model())
    assert [type(each).__name__ for each in found] == ["Linear", "Linear", "Experts"]
    assert [(each.product.shape, each.product.bias) for each in found[:2]] == [((96, 48), BF16), ((48, 96), None)]
    experts = found[2]
    assert (experts.up.shape, experts.up.parts, experts.down.shape) == ((4, 64, 48), (32, 32), (4, 48, 32))
    assert {each.dtype for each in found} == {BF16}


def test_activations_that_units_do_not_take_ask_for_no_kernel(monkeypatch):
    monkeypatch.setattr(ahead.fp8, "HAS_TRITON", True)
    model = small_model(dtype=torch.float32)
    model[4].spare = nn.Parameter(torch.empty(1, dtype=torch.float16, device="meta"))
    assert [type(each).__name__ for each in ahead.products_of(model)] == ["Experts"]  # in float16, which its model says
    assert ahead.products_of(small_model(dtype=torch.float32)[:3]) == []


def test_a_job_is_done_by_who_comes_first():
    done = []
    job = ahead.Job(lambda: done.append(1))
    job.run()
    job.run()
    job.claim()
    assert done == [1]
    claimed = ahead.Job(lambda: done.append(2))
    claimed.claim()
    claimed.run()
    assert done == [1]


def test_a_claim_waits_for_who_is_at_work_and_a_failure_is_silent():
    begun, go, done = threading.Event(), threading.Event(), []

    def compile_it() -> None:
        begun.set()
        go.wait(10)
        done.append(1)
        raise RuntimeError("no compiler")

    job = ahead.Job(compile_it)
    worker = threading.Thread(target=job.run)
    worker.start()
    begun.wait(10)
    claiming = threading.Thread(target=lambda: (job.claim(), done.append(2)))
    claiming.start()
    go.set()
    worker.join(10)
    claiming.join(10)
    assert done == [1, 2]


def test_without_a_gpu_nothing_begins():
    before = threading.active_count()
    with ahead.Ahead(["cpu"]) as compiling:
        compiling.begin(small_model())
        assert threading.active_count() == before


def test_what_is_left_to_do_is_forgotten_by_a_load_that_fails():
    compiling = ahead.Ahead(["cpu"])
    compiling._jobs.append(ahead.Job(lambda: None))
    with pytest.raises(KeyboardInterrupt), compiling:
        raise KeyboardInterrupt
    assert not compiling._jobs
    assert compiling._device is None


def test_a_want_outside_of_a_search_leaves_nothing():
    ahead.want("nobody", lambda: None)
    ahead.settle("nobody")
    assert "nobody" not in ahead.wanted
