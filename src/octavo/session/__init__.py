"""Models that load themselves: layers quantized the moment they are complete, and updated in place.

Serving engines give parameters a ``weight_loader`` and call ``model.load_weights(pairs)``: the loader narrows, chunks,
transposes, maps experts, and in the end copies. A `Session` lets it run as it is, on parameters without storage, and
sees which *box* of which parameter each write fills:

    with octavo.layerwise(model, "fp8_channel", device="cuda") as session:
        model.load_weights(pairs)
    print(session.report)

    with session:  # once more: an update in place
        model.load_weights(new_pairs)

Promises: no storage before the first write; no layer in high precision longer than until its last write; complete means
that boxes tile every parameter; bytes are those of `octavo.schemes.quantize` of the whole parameter (of its partition,
under tensor parallelism). Does not promise to follow a loader that writes from other threads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..planning.plan import DEFAULT_STAGING_BYTES
from .pairs import Transform
from .session import Finish, Session
from .update import update


def layerwise(
    model: nn.Module,
    finish: Finish = "fp8_channel",
    device: str | torch.device | None = None,
    *,
    transform: Transform | None = None,
    direct: bool = True,
    duplicates: str = "error",
    optional: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
) -> Session:
    """A session in which a model loads itself, each layer quantized the moment it is complete.

    A context manager: inside, parameters have no storage until the first write to them; ``model.load_weights(pairs)``
    works as it is, and so do ``session.load(pairs)`` and any function that is given ``session.pairs(pairs)``. When it
    is left, boxes must have tiled every parameter. Entered again, it updates the loaded model in place.
    ``session.report`` says what each layer took, ``session.events`` what happened, in order. ``session.record(path)``
    makes a plan of what the loader would do, and ``session.stream(plan)`` carries it out.

    Args:
        model: any module; parameters may be on meta, or real (they give their memory back).
        finish: what becomes of a complete layer. A scheme, a `Recipe` or its dict form: octavo quantizes. A function:
            it is called once with each layer (a module with parameters of its own), and changes it in place or returns
            the module that takes its place. None: layers stay as loaded.
        device: where the layers go; default: where their parameters are, the CPU for those on meta.
        transform: sees each ``(name, tensor)`` before the loader; returns the pair or pairs that take its place, or
            None to drop it.
        direct: let writes go straight into FP8 where boxes hold whole scale groups, so that no layer exists in high
            precision. A loader that changes in place what earlier tensors wrote needs False.
        duplicates: "error", or "update" to let a later tensor win where two fill one box.
        optional: patterns of parameters whose values are right when no tensor comes.
        staging_bytes: bound on scratch memory, beside the layer that is loaded and the tensors that the loader holds.

    Raises:
        RecipeError: a recipe that can't be honoured on this model.
        CoverageError: on leaving, boxes that nothing wrote; at once, a box that two tensors write.
        LoaderError: a loader that does what can't be followed, a finish that fails.
        WeightError: a weight that is not finite.
        UpdateError: an update that failed midway: which layers are new, which old.
    """
    return Session(
        model,
        finish,
        device,
        transform=transform,
        direct=direct,
        duplicates=duplicates,
        optional=optional,
        staging_bytes=staging_bytes,
    )


__all__ = ["Session", "layerwise", "update"]
