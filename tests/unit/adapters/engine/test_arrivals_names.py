"""Names of new weights that a loader passes over: harmless, or meant for tensors that did not come."""

from __future__ import annotations

import logging

import pytest
from torch import nn

from octavo.adapters.engine import arrivals
from octavo.errors import CoverageError

UP, DOWN, NORM = "model.layers.0.up_proj.weight", "model.layers.0.down_proj.weight", "model.norm.weight"


class Layer(arrivals.Layer):
    waits = False

    def begin(self) -> None: ...

    def count(self) -> int:
        return 0

    def drop_what_came(self) -> None: ...

    def restore(self) -> None: ...


class Arrivals(arrivals.Arrivals[Layer]):
    engine = "Toy"
    log = logging.getLogger("toy")

    def add(self, name: str) -> None: ...


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = self.lm_head = nn.Linear(2, 2)


def told(came: list[str], passed_over: list[str]) -> str:
    """What is raised at the end of an update."""
    fillers = {name: {name: frozenset({"weight"})} for name in (UP, DOWN, NORM, "model.embedding.weight")}
    mine = Arrivals(Model(), [Layer(name, filled) for name, filled in fillers.items()])
    mine.names.update(came)
    for name in passed_over:
        mine.pass_over(name)
    try:
        mine.check_complete()
    except CoverageError as error:
        return str(error)
    return ""


def test_names_of_which_none_is_known_are_told_with_those_that_are() -> None:
    said = told([], ["policy.a.w", "policy.b.w", "policy.c.w", "policy.d.w"])
    assert "Toy's loader knows nothing of what came: policy.a.w, policy.b.w, policy.c.w, ...; it knows " in said
    assert f"model.embedding.weight, {DOWN}, {UP}, ..." in said


@pytest.mark.parametrize("name", [DOWN.removeprefix("model."), f"module.{DOWN}"])
def test_another_prefix_does_not_make_a_tensor_harmless(name: str) -> None:
    words = f"{name}: Toy's loader knows no such tensor, and {DOWN} did not come"
    assert words in told([NORM], [name])
    assert words in told([], [name])
    assert not told([NORM, DOWN], [name])


@pytest.mark.parametrize("name", ["value_head.weight", "model.layers.0.rotary.inv_freq", "visual.proj.weight"])
def test_what_comes_beside_known_tensors_is_harmless(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not told([UP], [name])
    assert f"passes over: 1 tensor ({name})" in caplog.text


def test_what_is_tied_to_another_may_come_alone() -> None:
    assert not told([], ["lm_head.weight"])


def test_an_update_of_nothing_or_of_what_other_processes_hold_is_none() -> None:
    assert not told([], [])
    assert not told(["model.layers.1.up_proj.weight"], ["value_head.weight"])


def test_a_tail_of_several_names_says_nothing() -> None:
    assert not told([UP], ["0.weight", "weight"])
