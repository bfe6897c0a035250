"""From a plan to a filled model: the stages that every load of a transformers model goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...planning.plan import Plan
from ...session.update import Routes
from ...streaming.meter import Stages, measured
from ...streaming.report import Report
from ...streaming.sinks import ParameterSink, allocate_all
from ...streaming.stream import Stream
from .swap import assign, swap


def fill(
    model: Any,
    checkpoint: Checkpoint,
    plan: Plan,
    stages: Stages,
    *,
    threads: int | None,
    direct_io: bool | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
    notes: Sequence[str] = (),
    finish: Callable[[], None] | None = None,
) -> None:
    """Swap the modules of a model on meta, then allocate its memory and stream the checkpoint into it.

    The model is left with its ``load_report``, and with the ``load_routes`` by which `octavo.update` finds its way.

    Args:
        stages: where the seconds of each stage are counted.
        threads: as for `octavo.load`, and so are ``direct_io`` and ``progress``.
        notes: what the report tells beside its figures.
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
    model.load_report = Report.of(plan, stream.budget, tally, stages, meter, notes=notes)
    model.load_routes = Routes.of(plan, checkpoint)
