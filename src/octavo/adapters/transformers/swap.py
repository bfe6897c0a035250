"""From a plan to a filled model, in `octavo.load` and in ``from_pretrained``.

Modules take their FP8 form while all parameters are still on meta. Then each parameter gets its memory, and a stream
fills it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...machine import on_cpu
from ...planning.budget import Budget
from ...planning.plan import Plan
from ...planning.routes import Routes
from ...running import modules
from ...running.ahead import Ahead
from ...running.made import Made
from ...streaming.checks import Checks
from ...streaming.meter import Stages, measured
from ...streaming.report import Report
from ...streaming.sinks import ParameterSink, Storage, allocate_all
from ...streaming.stream import Tally, execute
from ...text import shown
from .facts import facts_of
from .reads import Reading

#: the ``quant_method`` in the quantization_config of a model that octavo quantized
METHOD = "octavo"


def fill(
    model: Any,
    checkpoint: Checkpoint,
    plan: Plan,
    stages: Stages,
    *,
    threads: int | None,
    direct_io: bool | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
    finish: Callable[[], None] | None = None,
    checks: Checks | None = None,
    ahead: Ahead | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Turn a model on meta into one that holds what the plan says.

    Its modules have their FP8 form already. Afterwards ``model.load_report`` tells what happened, and
    ``model.load_routes`` where each checkpoint tensor has gone, for `octavo.update`. Threads,
    direct_io and progress are those of `octavo.load`.

    Args:
        stages: counts the seconds of each stage.
        finish: does what else belongs to this load, once all weights are in place, and is measured with it.
        checks: compares what is read with the checkpoint's digests.
        ahead: compiles meanwhile what a forward will need; by default one that begins here.
        notes: for the report, beside those of the plan.
    """
    budgets = [Budget.fit(part.placements, plan.staging_bytes, threads) for part in plan.parts()]
    on_host = sum(placement.final_bytes for placement in plan.placements if on_cpu(placement.device))
    advice = "Another device takes the weights; a smaller staging_bytes, or fewer threads, need less beside them."
    for budget in budgets:
        budget.require(plan.source, on_host, advice if on_host else "")
    with measured(plan, progress) as meter, ahead or Ahead(plan.devices if plan.quantized else ()) as compiling:
        compiling.begin(model)
        with stages("allocate"):
            storages = allocate_all(plan.placements)
            assign(model, storages)
        with stages("stream"):
            tally = Tally()
            meter.follow(tally)
            how: dict[str, Any] = {"threads": threads, "direct_io": direct_io, "checks": checks}
            execute(checkpoint, plan, ParameterSink(storages), tally=tally, progress=meter.progress, **how)
        if finish is not None:
            finish()
    budget = max(budgets, key=lambda budget: budget.staging_bytes)
    model.load_report = Report.of(plan, budget, tally, stages, meter, notes=(*plan.notes, *notes))
    model.load_routes = Routes.of(plan, checkpoint)


def swap_planned(model: Any, plan: Plan) -> None:
    """`swap` what a plan quantizes."""
    swap(model, [(p.name, p.scheme, p.parts) for p in plan.quantized if p.scheme])


def swap(model: Any, weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Give the modules of these weights their FP8 form, still without memory.

    Args:
        weights: name, scheme and parts of each: what a plan has decided, or what `modules.quantized_weights` told of a
            model when it was saved.

    Raises:
        ValueError: parts that don't make up their weight. Others for weights that the model does not have.
    """
    facts, spoken = facts_of(model), _dtypes(model)
    for name, scheme, parts in weights:
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        fact = facts[name]
        if isinstance(module, nn.Linear):
            _check_parts(name, parts, module.out_features)
            if fact.reading == Reading.NOTHING:
                modules.quantize_linear(model, path, scheme, parts)
            else:
                made: Any = modules.quantize_linear(model, path, scheme, parts, modules.ReadLinear)
                made.is_read_in_training = fact.reading == Reading.IN_TRAINING
            continue
        parameter = getattr(module, leaf)
        shape = fact.stack.apart if fact.stack and fact.stack.apart else tuple(parameter.shape)
        if fact.transposed:  # quantized stacks are stored [experts, out, in], whatever the class does
            shape = (*shape[:-2], shape[-1], shape[-2])
        _check_parts(name, parts, shape[-2])
        if fact.stack is None:
            modules.quantize_stack(module, leaf, scheme, shape, parts)
        else:
            joined = tuple(parameter.shape) if fact.stack.apart else None
            form = modules.Form(parameter.dtype, fact.transposed, joined)
            modules.quantize_read_stack(module, leaf, scheme, shape, parts, form)
    for part, dtype in spoken.items():
        if part.dtype != dtype:
            part.__class__ = _speaking(type(part))  # type: ignore[arg-type]
            part._activation_dtype = dtype


def _dtypes(model: nn.Module) -> dict[Any, torch.dtype]:
    """The dtype that a model and each model within it says it has: that of a first parameter, and of activations."""
    parts: Iterable[Any] = (part for part in model.modules() if hasattr(type(part), "base_model_prefix"))
    return {part: part.dtype for part in parts if next(part.parameters(), None) is not None}


@functools.cache
def _speaking(cls: type) -> type:
    """A class of models like another, that say the dtype which they had before their first parameter became FP8."""
    said = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = {"octavo_made": (_speaking, (cls,)), "dtype": property(operator.attrgetter("_activation_dtype"))}
    return type(cls.__name__, (cls, Made), {**said, **made})


def _check_parts(name: str, parts: tuple[int, ...], rows: int) -> None:
    if not all(type(part) is int and part > 0 for part in parts) or sum(parts) != rows:
        raise ValueError(f"{name}: {rows:,} rows in parts of {shown(list(parts))}")


def assign(model: Any, storages: Mapping[str, Storage]) -> None:
    """Give a model's parameters and buffers their memory, by name."""
    for name, storage in storages.items():
        _set(model, name, storage.weight)
        if storage.scale is not None:
            _set(model, modules.scale_name(name), storage.scale)


def _set(model: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers would initialise it anew
    module._parameters[leaf] = parameter
