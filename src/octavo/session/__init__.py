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

from .pairs import Transform
from .report import LayerwiseReport
from .session import Session
from .update import update_model

__all__ = ["LayerwiseReport", "Session", "Transform", "update_model"]
