"""By which names an engine's loader takes the matrices of experts that are stacks in the file: it is asked, dry.

What is loaded is what `octavo convert` would write: a stack cut into matrices, so that both ways give the same bytes.
Loaders differ in what they call an expert's matrices, and some take none; these are given the stack as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from ...planning.plan import Plan
from ...planning.stacks import NAMINGS, Series
from .survey import Surveyor

#: layers that a loader refuses before it counts as refusing all that are alike; one may be an exception
_ENOUGH = 2


def matrices_of(series: Sequence[Series]) -> dict[str, str]:
    """All names that matrices of experts in stacks may have -> what all experts of their layer are called."""
    layers = [layer for experts in series for layer in experts.layers]
    cuts = [(layer.base, layer.cut(naming)) for layer in layers for naming in NAMINGS]
    return {matrix.name: base for base, cut in cuts for matrices in cut.values() for matrix in matrices}


def settle(
    series: Sequence[Series], plan: Plan, plan_anew: Callable[[], Plan], ask: Callable[[Plan], Surveyor]
) -> Plan:
    """Give experts the first names that are taken in FP8, or none: then they stay stacks; returns the plan with them.

    A series never goes back to names that were refused once, so that asking another model of the same kind ends.

    Args:
        plan: with the names that ``series`` have.
        plan_anew: makes the plan with the names that they have meanwhile.
        ask: makes what asks the model's loader about some of a plan.
    """
    for experts in series:
        here = functools.cache(functools.partial(_here, experts, plan_anew, ask))
        while experts.naming is not None and not _taken(experts, plan, ask, here):
            if not experts.next():
                experts.naming = None
            plan = plan_anew()
    return plan


def _taken(experts: Series, plan: Plan, ask: Callable[[Plan], Surveyor], here: Callable[[], set[str]]) -> bool:
    """Ask about one layer, or more where it is elsewhere, or where it may be kept unquantized."""
    quantized = {placement.name: placement for placement in plan.quantized}
    refused = 0
    for cut in experts.cuts():
        names = [matrix.name for matrices in cut.values() for matrix in matrices]
        mine = tuple(quantized[name] for name in names if name in quantized)
        answer = ask(dataclasses.replace(plan, placements=mine)).takes() if mine else None
        if answer or (answer is None and not here()):
            return True
        refused += answer is False or not here().isdisjoint(cut)  # it may pass over names that it does not know
        if refused == _ENOUGH:
            break
    return not refused


def _here(experts: Series, plan_anew: Callable[[], Plan], ask: Callable[[Plan], Surveyor]) -> set[str]:
    """The stacks that the loader has a use for in this process: other ranks, or another model, have the rest."""
    naming, experts.naming = experts.naming, None
    plan = plan_anew()
    experts.naming = naming
    stacks = {info.name for layer in experts.layers for info in layer.stacks.values()}
    mine = tuple(placement for placement in plan.placements if placement.name in stacks)
    return ask(dataclasses.replace(plan, placements=mine)).lands()
