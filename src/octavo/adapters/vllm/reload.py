"""Loading again: checkpoints and tensors in bf16, requantized into the memory that the model has.

vLLM reloads layer by layer (``reload_weights``, ``start_weight_update`` and ``update_weights``): it gives a layer its
parameters in checkpoint format back, loads into them through ``model.load_weights``, processes them, and copies the
result to where the kernels have it. So all that is needed is that ``load_weights`` quantizes what the survey said
becomes FP8. Outside of such a reload the parameters are those of kernels, and loading into them would go wrong, at
worst without a word: that is refused.

vLLM counts the elements that come for a layer, and processes it when they are as many as it has, or when the reload
ends; what has not come is then whatever its memory held. So names are counted here: a layer for which some tensors came
and others did not stays as it was, and is named.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ... import schemes
from ...api import iterate
from ...checkpoint import Checkpoint, TensorInfo
from ...errors import CheckpointError, CoverageError, raise_problems
from ...formats import Format
from ...plan import Placement, Plan
from ...schemes import FP8
from . import versions
from .options import Options

_ATTRIBUTE = "_octavo_weights"


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a model of vLLM was loaded from; its ``load_weights`` is replaced by `load`."""

    plan: Plan
    layout: Format
    model: nn.Module
    original: Callable[[Iterable[tuple[str, Tensor]]], Any]
    fillers: Mapping[str, frozenset[str]]  # layer -> the tensors, scales included, that fill it in this process
    #: layer -> those that have come, as long as vLLM waits for the others
    arrived: dict[str, set[str]] = dataclasses.field(default_factory=dict)

    def load(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """``model.load_weights`` for tensors named and shaped as in the checkpoint."""
        if not versions.reloading(self.model):
            raise CheckpointError(
                f"{type(self.model).__name__}.load_weights: this model holds {self.plan.recipe.scheme} in the form of "
                "vLLM's kernels, into which weights can't be loaded. Use reload_weights (also with an iterator), or "
                "start_weight_update, update_weights and finish_weight_update."
            )
        try:
            return self.original(self.quantized(weights), *args, **kwargs)
        finally:
            for layer in [name for name in self.arrived if not self._waits(name)]:
                del self.arrived[layer]

    def check_complete(self) -> None:
        """At the end of a reload: leave layers as they were of which only a part has come, and raise for them."""
        problems = []
        for layer, came in self.arrived.items():
            lacking = self.fillers[layer] - came
            if lacking and self._waits(layer):
                versions.leave_as_it_was(self.model.get_submodule(layer))
                names = sorted(lacking - {self.layout.scale_name(name) for name in lacking})
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                problems.append(f"{layer}: {min(came)} came, {names[0]}{more} did not")
        self.arrived.clear()
        advice = "These layers are as they were before; all others that came whole are new. Send whole layers."
        raise_problems(CoverageError, f"{type(self.model).__name__}, new weights", problems, advice)

    def _waits(self, layer: str) -> bool:
        return versions.waits(self.model.get_submodule(layer))

    @functools.cached_property
    def _layers_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for layer, names in self.fillers.items():
            for name in names:
                found.setdefault(name, []).append(layer)
        return found

    def _arrives(self, name: str) -> None:
        for layer in self._layers_of.get(name, ()):
            came = self.arrived.setdefault(layer, set())
            if name in came:
                if self._waits(layer):
                    raise CoverageError(
                        f"{name}: came twice in one update, before {layer} was complete. vLLM counts elements, and "
                        "would take it for another tensor of that layer. End the update, and begin anew."
                    )
                came.clear()
            came.add(name)

    def quantized(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Each tensor as it was first loaded: in FP8 and followed by its scale, or as it is."""
        if isinstance(weights, CheckpointWeights):
            yield from weights.quantized()
            return
        becoming = {placement.name: placement for placement in self.plan.quantized}
        for name, weight in weights:
            placement = becoming.get(name)
            if placement is None or weight.dtype == FP8:
                self._arrives(name)
                yield name, weight
                continue
            self._check(placement, weight)
            self._arrives(name)
            q, scale = schemes.quantize(weight, str(placement.scheme))
            del weight
            yield name, q
            del q
            self._arrives(self.layout.scale_name(name))
            yield self.layout.scale_name(name), self.layout.stored_scale(scale)

    def _check(self, placement: Placement, weight: Tensor) -> None:
        if tuple(weight.shape) != placement.shape:
            raise CoverageError(
                f"{placement.name}: has the shape {list(weight.shape)}, was loaded with {list(placement.shape)}"
            )


def prepare(model: Any, plan: Plan, layout: Format, fillers: Mapping[str, frozenset[str]]) -> None:
    """Have later calls of ``model.load_weights`` quantize as the first one did, and reloads checked."""
    weights = Weights(plan, layout, model, model.load_weights, fillers)
    setattr(model, _ATTRIBUTE, weights)
    model.load_weights = weights.load
    versions.watch_reloads(_check_complete)


def _check_complete(model: nn.Module) -> None:
    weights: Weights | None = getattr(model, _ATTRIBUTE, None)
    if weights is not None:
        weights.check_complete()


class CheckpointWeights:
    """Another checkpoint of the same model; iterated over, its tensors as they are, as vLLM expects them of a loader.

    Raises:
        CoverageError: when made, before anything is read, if it has not the tensors that the model was loaded from.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, options: Options) -> None:
        loaded: Weights | None = getattr(model, _ATTRIBUTE, None)
        if loaded is None:
            raise CheckpointError(f"{type(model).__name__}: was not loaded by octavo, and can't be reloaded by it")
        problems = []
        for placement in loaded.plan.placements:
            info = checkpoint.tensors.get(placement.name)
            if info is None:
                problems.append(f"has no {placement.name}")
            elif info.shape != placement.shape:
                problems.append(f"{placement.name} has the shape {list(info.shape)}, not {list(placement.shape)}")
            elif placement.scheme and not info.quantizable:
                problems.append(f"{placement.name} is {info.dtype_name}, not bf16, fp16 or fp32")
        raise_problems(CoverageError, checkpoint.path, problems, "Nothing was loaded: the model is as it was.")
        self._checkpoint, self._loaded, self._threads = checkpoint, loaded, options.threads

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._read(quantized=False)

    def quantized(self) -> Iterator[tuple[str, Tensor]]:
        """In FP8, each with its scale, as the model was first loaded."""
        return self._read(quantized=True)

    def _read(self, *, quantized: bool) -> Iterator[tuple[str, Tensor]]:
        infos, plan = self._checkpoint.tensors, self._loaded.plan
        ordered = sorted(plan.placements, key=lambda p: (infos[p.name].shard, infos[p.name].offset))
        placements = tuple(_of_checkpoint(p, infos[p.name], quantized) for p in ordered)
        plan = dataclasses.replace(plan, source=str(self._checkpoint.path), placements=placements)
        return iterate(self._checkpoint, plan, self._loaded.layout, threads=self._threads)


def _of_checkpoint(placement: Placement, info: TensorInfo, quantized: bool) -> Placement:
    """The placement of the same tensor in another checkpoint."""
    placement = dataclasses.replace(placement, source_dtype_names=(info.dtype_name,), source_bytes=info.nbytes)
    if placement.scheme and quantized:
        return placement
    return dataclasses.replace(placement, dtype_name=info.dtype_name, scheme=None, parts=())
