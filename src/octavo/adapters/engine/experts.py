"""By which names an engine's loader takes the matrices of experts that are stacks in the file: it is asked, dry.

What is loaded is what `octavo convert` would write: a stack cut into matrices, so that both ways give the same bytes.
Loaders differ in what they call an expert's matrices, and some take none; these are given the stack as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ...planning.plan import Plan
from ...planning.stacks import Series

#: layers that a loader refuses before it counts as refusing all that are alike; one may be an exception
_ENOUGH = 2


def settle(
    series: Sequence[Series], plan: Plan, plan_anew: Callable[[], Plan], takes: Callable[[Plan], bool | None]
) -> Plan:
    """Give experts the first names that are taken in FP8, or none: then they stay stacks; returns the plan with them.

    A series never goes back to names that were refused once, so that asking another model of the same kind ends.

    Args:
        plan: with the names that ``series`` have.
        plan_anew: makes the plan with the names that they have meanwhile.
        takes: whether the loader takes all of a plan in FP8; None: it passes over it.
    """
    for experts in series:
        while experts.naming is not None and not _taken(experts, plan, takes):
            if not experts.next():
                experts.naming = None
            plan = plan_anew()
    return plan


def _taken(experts: Series, plan: Plan, takes: Callable[[Plan], bool | None]) -> bool:
    """Ask about one layer, or more where a pipeline has it elsewhere, or where it may be kept unquantized."""
    quantized = {placement.name: placement for placement in plan.quantized}
    refused = 0
    for cut in experts.cuts():
        names = [matrix.name for matrices in cut.values() for matrix in matrices]
        mine = tuple(quantized[name] for name in names if name in quantized)
        answer = takes(dataclasses.replace(plan, placements=mine)) if mine else None
        if answer:
            return True
        refused += answer is False
        if refused == _ENOUGH:
            break
    return not refused
