"""Whether an engine's loader fills each parameter of a model once, with what it may hold. Imports no engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from ...checkpoint import dtypes
from ...elements.boxes import coverage_problem
from ...elements.dry_run import Copy, Trace
from ...planning.plan import Plan


def coverage(model: nn.Module, seen: Trace, plan: Plan, unneeded: Collection[str]) -> list[str]:
    """What is wrong with parameters of a model, by what a dry run of the plan's tensors has shown.

    Args:
        unneeded: parameters to which nothing has to go.
    """
    written = seen.by_target()
    dtype_names = {placement.name: placement.source_dtype_names[0] for placement in plan.placements}
    # which an engine would take for weights, number by number: integers, and FP8 without a scale
    no_floats = {name for name, dtype in dtype_names.items() if dtypes.TORCH[dtype] not in dtypes.QUANTIZABLE}
    problems = []
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or name in unneeded:
            continue
        copies = written.get(name, [])
        problem = None
        if name in seen.opaque:
            problem = f"{seen.opaque[name]} goes into it in a way that can't be followed"
        elif not copies:
            problem = "comes from no tensor of the checkpoint"
        elif parameter.is_floating_point() and (
            odd := [c.src_name for c in copies if not c.sources.isdisjoint(no_floats)]
        ):
            problem = f"{odd[0]} goes there, which is {dtype_names[odd[0]]}: no bf16, fp16 or fp32"
        elif len(copies) > 1 or copies[0].box.size != tuple(parameter.shape):
            problem = uncovered(parameter, copies)
        if problem:
            problems.append(f"{name} {list(parameter.shape)}: {problem}")
    return problems


def uncovered(parameter: Tensor, copies: Sequence[Copy]) -> str | None:
    """Say why the copies don't tile a parameter, or None. Constants fill the padding, or what is written later."""
    from_checkpoint = [copy for copy in copies if copy.sources]
    problem = coverage_problem(parameter.shape, from_checkpoint)
    if problem and len(from_checkpoint) < len(copies):
        constants = [copy for copy in copies if not copy.sources]
        problem = coverage_problem(parameter.shape, [*from_checkpoint, *constants])
    if problem and "come from no" in problem:
        names = sorted({copy.src_name for copy in from_checkpoint})
        problem = f"only {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} {_go(names)} there; {problem}"
    return problem


def _go(names: Sequence[str]) -> str:
    return "goes" if len(names) == 1 else "go"
