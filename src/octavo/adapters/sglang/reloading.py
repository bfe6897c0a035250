"""Loading again: checkpoints and tensors in bf16, requantized into the memory that the model has.

However SGLang is given new weights (from disk, from tensors, from other processes), they come to the model's
``load_weights``; what SGLang does to layers before and after it, it does not do a second time (see `Form`). So bf16 is
quantized wherever it comes from, and nothing is loaded into what kernels read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...elements.inline import pools_inline
from ...errors import CheckpointError, CoverageError, Lines, OctavoError
from ..engine import updating
from ..engine.joining import Joining
from ..engine.loading import Loading
from ..engine.options import Options
from ..engine.soundness import Soundness
from ..engine.survey import Survey, layer_of, whole_text
from . import kept, plugin, runner, versions
from .arrivals import Arrivals
from .computed import METHOD
from .forms import Forms

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_updated: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # to which something came, since an update ended


@dataclasses.dataclass(frozen=True)
class Weights(updating.Weights):
    """Of a model of SGLang."""

    arrivals: Arrivals
    forms: Forms
    options: Options

    unsound = "Its layer is as it was"

    def load(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
        """``model.load_weights``; a layer has its new weights once all of its tensors have come, in whatever call."""
        if elsewhere := self.forms.elsewhere:
            raise CheckpointError(
                f"{type(self.model).__name__}: {elsewhere} is offloaded, and can't be given new weights. Start anew to "
                "load them, or leave --cpu-offload-gb out."
            )
        if not versions.is_whole(self.model):
            raise CheckpointError(
                f"{type(self.model).__name__}: is a stage of a pipeline, and can't be given new weights: SGLang answers"
                " for the first stage alone, so what fails in another would leave them mixed. Start anew to load them, "
                "or leave --pp-size out."
            )
        _updated.add(self.model)
        with torch.no_grad(), self.forms.of_checkpoint(), pools_inline():
            return super().load(weights, *args, **kwargs)

    @contextlib.contextmanager
    def loading_at_once(self) -> Iterator[None]:
        with contextlib.ExitStack() as meanwhile:
            meanwhile.enter_context(self.forms.outlined())
            for module in self.model.modules():
                if hasattr(module, METHOD):
                    meanwhile.enter_context(versions.without(module, METHOD))
            yield

    def _read(self, weights: updating.CheckpointWeights, soundness: Soundness) -> Iterator[tuple[str, Tensor]]:
        return self._taken(super()._read(weights, soundness), soundness)

    def _quantized(self, weights: Iterable[tuple[str, Tensor]], soundness: Soundness) -> Iterator[tuple[str, Tensor]]:
        return self._taken(super()._quantized(self._used(weights), soundness), soundness)

    def _used(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All but tensors of the checkpoint for which the loader had no use, in this process."""
        for name, weight in weights:
            known = name in self._placements or name in self._matrices or name in self.arrivals
            if known or name not in self.tensors:
                yield name, weight
            else:
                self._pass_over(name)

    def _taken(self, pairs: Iterator[tuple[str, Tensor]], soundness: Soundness) -> Iterator[tuple[str, Tensor]]:
        """What the loader is given; after each of them, layers that are whole are new."""
        for name, tensor in pairs:
            if self.arrivals.is_written_at_once(name):
                soundness.check()
            yield name, tensor
            del tensor
            self.arrivals.take(name, soundness.check)

    def _other(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        targets = self._names.targets(name, weight)
        if targets is None:
            raise CoverageError(
                f"{name}: is no tensor of the checkpoint, and {type(self.model).__name__} can't say where it goes in "
                f"the shape {list(weight.shape)}, so it might be written over what SGLang's kernels read. Name tensors "
                "as the checkpoint does."
            )
        for target in targets:
            form = self.forms.get(layer_of(target))
            if form is not None and form.stages:
                raise CoverageError(
                    f"{name}: is no tensor of the checkpoint, and SGLang puts it into {form.name}, which is in the "
                    f"form of its kernels. Name tensors as the checkpoint does: {', '.join(form.tensors[:3])}, ..."
                )
        yield name, weight


def prepare(model: Any, loading: Loading, found: Survey, options: Options, paths: Mapping[str, str]) -> None:
    """Have later calls of ``model.load_weights`` quantize as the first one did. Called before SGLang's processing.

    Args:
        paths: the place of each layer in the model -> SGLang's name of it.
    """
    # before forms, which note what processing is: a layer that can't have its new weights stays as it was
    Joining("SGLang", plugin.log, lambda _: None).follow(model, paths)
    forms = Forms(model, found.fillers, versions.processes)
    arrivals = Arrivals(model, found.fillers, forms)
    tensors, load = loading.checkpoint.tensors, model.load_weights
    updating.prepare(Weights(tensors, found.plan, loading.layout, model, load, arrivals, forms, options))
    for module in model.modules():
        if hasattr(module, METHOD):
            _compute_in_form_of_checkpoint(module, model, forms)
    _models.add(model)
    runner.watch()


def _compute_in_form_of_checkpoint(module: nn.Module, model: nn.Module, forms: Forms) -> None:
    compute = getattr(module, METHOD)

    @functools.wraps(compute)
    def post_load_weights(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), forms.of_checkpoint(), kept.in_place(model):
            return compute(*args, **kwargs)

    module.__dict__[METHOD] = post_load_weights


def reload(model: Any, open_checkpoint: Callable[[], Checkpoint]) -> None:
    """Load a checkpoint in bf16 into a model that octavo has loaded.

    Raises:
        OctavoError: before anything is read, where it does not fit; else layers that have come whole are new.
    """
    loaded, checkpoint = _weights(model), open_checkpoint()
    weights = updating.CheckpointWeights(checkpoint, model, loaded.options)
    try:
        model.load_weights(weights)
        loaded.arrivals.check_complete()
    except Exception as error:
        what = str(error) if isinstance(error, OctavoError) else whole_text(error)
        advice = (
            "Layers that had come whole are new, all others as they were: load the folder from before again, or this"
        )
        raise CheckpointError(Lines.of(*f"{checkpoint.path}: {what}".splitlines(), f"{advice} one, mended.")) from error
    finally:
        _updated.discard(model)


def sleep(loses: Callable[[nn.Module], bool]) -> Callable[[], None]:
    """Before memory of models is given back, of some without a copy: know that all of their weights have to come anew.

    Returns:
        What to call when there is memory again: it restores parameters that no checkpoint fills.
    """
    lost = [model for model in _models if loses(model)]
    filled = {id(parameter) for model in _models for parameter in _weights(model).forms.filled()}
    rest: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for model in lost:
        _weights(model).arrivals.lose()
        for parameter in model.parameters():
            if id(parameter) not in filled and id(parameter) not in rest:
                rest[id(parameter)] = parameter, parameter.detach().cpu().clone()

    def wake() -> None:
        with torch.no_grad():
            for parameter, held in rest.values():
                parameter.copy_(held)

    return wake


def drop() -> None:
    """Before an update, where SGLang says so, and after one that failed: forget what waits."""
    for model in _models:
        _weights(model).arrivals.drop()
    _updated.clear()


def bring(version: str | None) -> None:
    """Before a call of an update: what it brings is of this version, if its trainer says one."""
    for model in _models:
        _weights(model).arrivals.version = version


def check_complete() -> None:
    """After an update, where SGLang says so.

    Raises:
        CoverageError: naming all layers, of the models that were updated, of which a part has come; they are as they
            were.
    """
    problems: list[str] = []
    for model in list(_updated or _models):
        try:
            _weights(model).arrivals.check_complete()
        except CoverageError as error:
            problems += str(error).splitlines()
    _updated.clear()
    if problems:
        raise CoverageError(Lines.of(*problems))


def _weights(model: nn.Module) -> Weights:
    found = updating.of(model)
    assert isinstance(found, Weights)
    return found
