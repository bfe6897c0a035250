"""Loading again: checkpoints and tensors in bf16, requantized into the memory that the model has.

vLLM reloads layer by layer (``reload_weights``, ``start_weight_update`` and ``update_weights``): it gives a layer its
parameters in checkpoint format back, loads into them through ``model.load_weights``, processes them, and copies the
result to where the kernels have it. So all that is needed is that ``load_weights`` quantizes what the survey said
becomes FP8. Outside of such a reload the parameters are those of kernels, and loading into them would go wrong, at
worst without a word: that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...conversion.formats import Format
from ...errors import CheckpointError
from ...planning.plan import Plan
from ..engine import updating
from ..engine.joining import Joining
from ..engine.survey import Fillers
from . import repacking, versions
from .arrivals import Arrivals
from .telling import log


class Weights(updating.Weights):
    """Of a model of vLLM."""

    def load(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        if not versions.reloading(self.model):
            raise CheckpointError(
                f"{type(self.model).__name__}.load_weights: this model holds {self.plan.recipe.scheme} in the form of "
                "vLLM's kernels, into which weights can't be loaded. Use reload_weights (also with an iterator), or "
                "start_weight_update, update_weights and finish_weight_update."
            )
        return super().load(weights, *args, **kwargs)

    def loading_at_once(self) -> AbstractContextManager[None]:
        return versions.loading_at_once(self.model)


def prepare(
    model: Any, checkpoint: Checkpoint, plan: Plan, layout: Format, fillers: Fillers, paths: Mapping[str, str]
) -> None:
    """Have later calls of ``model.load_weights`` quantize as the first one did, and updates checked.

    Args:
        paths: the place of each layer in the model -> vLLM's name of it.
    """
    arrivals = Arrivals(model, fillers)
    updating.prepare(Weights(checkpoint.tensors, plan, layout, model, model.load_weights, arrivals))
    repacking.follow(model)
    Joining("vLLM", log, versions.begin_anew).follow(model, paths)
    versions.watch_reloads(_check_complete)


def _check_complete(model: nn.Module) -> None:
    weights = updating.of(model)
    if weights is not None:
        weights.arrivals.check_complete()
