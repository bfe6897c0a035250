"""A checkpoint in FP8 that exists nowhere, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..planning.budget import Budget
from ..planning.plan import Plan
from ..streaming.checks import Checks
from ..streaming.sinks import IteratorSink
from ..streaming.stream import Stream, Tally
from . import formats


def iterate(
    checkpoint: Checkpoint,
    made: Plan,
    layout: formats.Format,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tally: Tally | None = None,
    checks: Checks | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Carry out a plan as `octavo.stream` promises; ``tally`` collects bytes and seconds, ``checks`` compares."""
    budget = Budget.fit(made.placements, made.staging_bytes, threads, handing_out=True)
    # on an accelerator, this thread does the work
    ahead_bytes = None if budget.lanes else made.staging_bytes - budget.staging_bytes
    sizes = {p.final_bytes: p.name for p in made.placements if torch.device(p.device).type == "cpu"}
    largest_bytes = max(sizes, default=0)  # which is handed out whole
    if largest_bytes > (ahead_bytes or 0):
        advice = "octavo.convert writes tensors of any size."
        budget.require(f"{made.source}: {sizes[largest_bytes]}", largest_bytes, advice)
    else:
        budget.require(made.source, ahead_bytes or 0)
    stream = Stream(checkpoint, made, IteratorSink(ahead_bytes), budget=budget, tally=tally, checks=checks)
    return _handed_out(stream, layout, progress)


def _handed_out(
    stream: Stream, layout: formats.Format, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    handed = 0
    with contextlib.closing(stream.iterate()) as placed:
        for placement, storage in placed:
            name, weight, scale = placement.name, storage.weight, storage.scale
            del storage  # what the consumer drops is gone
            if scale is not None and formats.has_groups(placement.scheme):
                yield from layout.handed_out(placement, weight, scale).items()
                del weight, scale
                handed += placement.stored_bytes
                if progress:
                    progress(handed, stream.plan.stored_bytes)
                continue
            weight = layout.stored_weight(placement.scheme, weight)
            yield layout.weight_name(placement), weight
            del weight
            if scale is not None:
                yield layout.scale_name(name), layout.stored_scale(placement, scale)
            del scale
            yield from layout.beside(placement).items()
            handed += placement.stored_bytes
            if progress:
                progress(handed, stream.plan.stored_bytes)
