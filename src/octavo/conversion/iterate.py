"""A checkpoint in FP8 that exists nowhere, tensor by tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..errors import DeviceError
from ..machine import available_bytes
from ..planning.budget import Budget
from ..planning.plan import Plan
from ..streaming.sinks import IteratorSink
from ..streaming.stream import Stream, Tally
from . import formats


def check_room(made: Plan) -> None:
    """Raise a `DeviceError` unless this machine has memory for the largest tensor, which is handed out whole."""
    largest = max(made.placements, key=lambda placement: placement.final_bytes, default=None)
    room = available_bytes()
    if largest and room and torch.device(largest.device).type == "cpu" and largest.final_bytes > room:
        raise DeviceError(
            f"{made.source}: {largest.name} takes {largest.final_bytes:,} bytes of memory, and {room:,} are available. "
            "octavo.convert writes tensors of any size."
        )


def iterate(
    checkpoint: Checkpoint,
    made: Plan,
    layout: formats.Format,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Carry out a plan as `octavo.stream` promises; ``tally`` collects bytes and seconds."""
    budget = Budget.fit(made.placements, made.staging_bytes, threads, handing_out=True)
    # on an accelerator, this thread does the work
    sink = IteratorSink(None if budget.lanes else made.staging_bytes - budget.staging_bytes)
    handed = 0
    with contextlib.closing(Stream(checkpoint, made, sink, budget=budget, tally=tally).iterate()) as placed:
        for placement, storage in placed:
            name, weight, scale = placement.name, storage.weight, storage.scale
            del storage  # what the consumer drops is gone
            yield name, weight
            del weight
            if scale is not None:
                yield layout.scale_name(name), layout.stored_scale(scale)
            del scale
            handed += placement.source_bytes
            if progress:
                progress(handed, made.source_bytes)
