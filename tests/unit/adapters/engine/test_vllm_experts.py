"""By which names a loader is given the matrices of stacks, on toy models that load as vLLM's do."""

from __future__ import annotations

import pytest

from helpers import headers
from helpers.vllm_toys import Stacked
from octavo import Recipe
from octavo.adapters.engine.experts import settle
from octavo.adapters.engine.survey import Surveyor
from octavo.conversion import formats
from octavo.planning.plan import plan_checkpoint
from octavo.planning.stacks import find_series

LAYOUT = formats.get("compressed-tensors")
SHAPES = {"experts.gate_up_proj": (3, 512, 256), "experts.down_proj": (3, 256, 256)}


def settled(model, scheme="fp8_channel"):
    """The plan as it is agreed with a model's loader, and what surveys it."""
    checkpoint = headers(SHAPES)
    series = find_series(checkpoint)

    def plan():
        return plan_checkpoint(checkpoint, Recipe(scheme), cuts=[cut for experts in series for cut in experts.cuts()])

    def ask(plan):
        return Surveyor(model, model.load_weights, plan, LAYOUT, engine="vLLM")

    return settle(series, plan(), plan, ask), ask


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_matrices_get_the_names_that_the_loader_takes(names, scheme):
    plan, ask = settled(Stacked(scheme, names), scheme)
    assert {placement.name.split(".")[2] for placement in plan.quantized} == {*names}
    found = ask(plan).run()
    assert not found.keep
    assert len(found.plan.quantized) == 9


def test_a_loader_that_takes_the_stack_alone_gets_it_and_the_reason_is_told():
    plan, ask = settled(Stacked(names=()))
    found = ask(plan).run()
    assert [placement.name for placement in plan.placements] == list(SHAPES)
    assert found.keep.keys() == {"gate_up", "down"}
    assert all(why.startswith("vLLM's loader does not take it with a scale") for why in found.keep.values())


def test_what_is_elsewhere_keeps_the_names_of_a_conversion():
    """Another rank of a pipeline has these layers."""
    model = Stacked()
    model.load_weights = lambda weights: [None for _ in weights]
    plan, _ = settled(model)
    assert "experts.0.gate_proj.weight" in [placement.name for placement in plan.quantized]


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ()])
def test_a_loader_may_pass_over_names_that_it_does_not_know(names):
    class Silent(Stacked):
        def load_weights(self, weights):
            stacks, known = [*SHAPES], self.names
            super().load_weights(
                (name, weight) for name, weight in weights if name in stacks or name.split(".")[2] in known
            )

    plan, _ = settled(Silent(names=names))
    matrices = [placement.name for placement in plan.quantized if placement.name not in SHAPES]
    assert {name.split(".")[2] for name in matrices} == {*names}


def test_one_layer_that_is_refused_is_no_reason_for_all():
    checkpoint = headers({f"layers.{n}.{name}": shape for n in range(3) for name, shape in SHAPES.items()})
    series = find_series(checkpoint)
    plan = plan_checkpoint(checkpoint, Recipe(), cuts=[cut for experts in series for cut in experts.cuts()])
    asked = []

    class Asking:
        def __init__(self, plan):
            self.layer = plan.placements[0].name.split(".")[1]

        def takes(self):
            asked.append(self.layer)
            return self.layer == "1"

        def lands(self):
            return {}

    assert settle(series, plan, lambda: plan, Asking) is plan
    assert asked == ["0", "1"]
