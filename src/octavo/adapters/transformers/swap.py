"""From a plan to a filled model: its modules take their FP8 form, and its parameters memory that a stream fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...planning.plan import Plan
from ...running import modules
from ...session.update import Routes
from ...streaming.meter import Stages, measured
from ...streaming.report import Report
from ...streaming.sinks import ParameterSink, Storage, allocate_all
from ...streaming.stream import Stream

#: what quantization_config.quant_method says of a model that octavo quantized
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
) -> None:
    """Swap the modules of a model on meta, then allocate its memory and stream the checkpoint into it.

    The model is left with its ``load_report``, and with the ``load_routes`` by which `octavo.update` finds its way.

    Args:
        stages: where the seconds of each stage are counted.
        threads: as for `octavo.load`, and so are ``direct_io`` and ``progress``.
        finish: whatever else belongs to the load, and to what is measured of it.
    """
    with stages("swap"):
        swap(model, [(p.name, p.scheme, p.parts) for p in plan.quantized if p.scheme])
    with measured(plan, progress) as meter:
        with stages("allocate"):
            storages = allocate_all(plan.placements)
            assign(model, storages)
        with stages("stream"):
            stream = Stream(checkpoint, plan, ParameterSink(storages), threads=threads, direct_io=direct_io)
            meter.follow(stream.tally)
            tally = stream.run(meter.progress)
        if finish is not None:
            finish()
    model.load_report = Report.of(plan, stream.budget, tally, stages, meter, notes=plan.notes)
    model.load_routes = Routes.of(plan, checkpoint)


def swap(model: Any, weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Give the modules of some weights their FP8 form, storage not yet assigned.

    Args:
        weights: (name, scheme, parts) of each, as a plan decides them, or as `quantized_weights` told them of a model
            that was saved.
    """
    for name, scheme, parts in weights:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            modules.quantize_linear(model, path, scheme, parts)
            continue
        shape = tuple(getattr(module, leaf).shape)
        if module.is_transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        modules.quantize_stack(module, leaf, scheme, shape, parts)


def assign(model: Any, storages: Mapping[str, Storage]) -> None:
    """Give parameters and buffers the memory that a stream has filled."""
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
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter
