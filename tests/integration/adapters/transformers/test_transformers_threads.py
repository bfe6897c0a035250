"""Loading in one thread while others go on: what they make is as ever, and their own loads are right."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import Checkpoints
from torch import nn

import octavo
from helpers.models import differences
from octavo.checkpoint.checkpoint import Checkpoint

pytest.importorskip("transformers")


@pytest.fixture(params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    return checkpoints.folder(request.param)


def in_the_middle(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> list[Any]:
    """Have another thread do something while a model is built, between any two of its layers; return what came."""
    found: list[Any] = []
    original = nn.Linear.__init__

    def linear(self: nn.Linear, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if threading.current_thread() is threading.main_thread() and not found:
            found.append(None)
            thread = threading.Thread(target=lambda: found.append(do()))
            thread.start()
            thread.join()

    monkeypatch.setattr(nn.Linear, "__init__", linear)
    return found


def test_modules_of_other_threads_are_as_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, torch.dtype]:
        torch.manual_seed(1)
        return nn.Linear(8, 8), torch.get_default_dtype()

    with torch.random.fork_rng():
        before, _ = make()
        found = in_the_middle(monkeypatch, make)
        octavo.load(folder)
    module, dtype = found[1]
    assert dtype == torch.float32
    assert differences(before, module) == []  # initialised, real, and in fp32


def test_nothing_of_torch_or_transformers_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def seen() -> dict[str, Any]:
        classes = (nn.Module, nn.Parameter, PreTrainedModel)
        attributes = {f"{c.__name__}.{name}": value for c in classes for name, value in vars(c).items()}
        attributes |= {f"init.{name}": value for name, value in vars(nn.init).items()}
        return attributes | {f"torch.{name}": value for name, value in vars(torch).items()}

    octavo.load(folder)  # what is imported or made on the first call is there
    before, found = seen(), in_the_middle(monkeypatch, seen)
    octavo.load(folder)
    assert [name for name, value in found[1].items() if value is not before.get(name)] == []


def test_two_loads_at_once_are_both_right(folder: Path) -> None:
    alone, loaded = octavo.load(folder), []
    barrier = threading.Barrier(2)

    def load() -> None:
        barrier.wait()
        loaded.append(octavo.load(folder))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [differences(alone, model) for model in loaded] == [[], []]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns of forks beside threads
def test_a_process_forked_in_the_middle_can_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.adapters.transformers import load

    checkpoint = Checkpoint.open(folder)

    def build(said: Any) -> None:
        layer = nn.Linear(8, 8)
        load.prepare(checkpoint, octavo.Recipe("fp8_channel"))
        said.send((str(layer.weight.dtype), layer.weight.is_meta, gc.isenabled()))

    def fork() -> Any:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        child = context.Process(target=build, args=(there,))
        child.start()
        said = here.recv() if here.poll(60) else None
        child.kill()
        child.join()
        return said

    found = in_the_middle(monkeypatch, fork)
    octavo.load(folder)
    assert found[1] == ("torch.float32", False, True)


def test_buffers_of_other_peoples_models_are_those_that_they_compute(checkpoints: Checkpoints) -> None:
    """A class that transformers does not know computes its tables when it is made, and never again."""
    from transformers import LlamaForCausalLM

    class Own(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("table", 1 / torch.arange(1, 9), persistent=False)
            self.register_buffer("wide", torch.arange(8).float(), persistent=False)

    model = octavo.load(checkpoints.folder("llama"), model_class=Own)
    assert model.table.dtype == torch.bfloat16
    torch.testing.assert_close(model.table, (1 / torch.arange(1, 9)).bfloat16())
    assert torch.equal(model.wide, torch.arange(8).float())
