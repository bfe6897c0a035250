"""A checkpoint on its way into a model that an engine makes. Imports no engine.

    plan     what becomes of all tensors of the checkpoint
    model    made by the engine, for the config of the FP8 checkpoint that the plan would make
    survey   dry runs: what goes where, whether all of it is there
    stream   through octavo's ring, quantized on the model's device, into the model's memory; what the engine's loader
             computes through the model's own ``load_weights``

Where a survey shows that some layer has to stay unquantized, the model is made a second time.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...conversion.formats import Format
from ...conversion.iterate import iterate
from ...errors import RecipeError
from ...planning.plan import Plan, plan_checkpoint
from ...planning.recipe import matching
from ...planning.stacks import NAMINGS, find_series
from ...streaming.meter import Stages, measured
from ...streaming.sinks import ParameterSink
from ...streaming.stream import Stream, Tally
from ...text import human_bytes, printable
from .experts import settle
from .layers import LayerPatterns
from .log import figures, outcome, warning
from .options import Options
from .placing import Places
from .survey import Survey, Surveyor

#: whether to show progress; None: where there is a terminal
Shown = bool | None
_Progress = Callable[[int, int], None] | None


class MakeAnewError(Exception):
    """Some layers have to stay unquantized, which the model that was made does not do."""

    def __init__(self, keep: Mapping[str, str]) -> None:
        super().__init__(", ".join(keep))
        self.keep = keep


class Layers(Protocol):
    """What is known of the layers of a model that was made; an engine's quantization config."""

    def paths(self, model: nn.Module) -> Mapping[str, str]:
        """The place of each layer in the model -> the engine's name of it."""

    def unquantized(self, model: nn.Module) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """The places of layers that were made unquantized -> why: as was asked; since the engine can't otherwise."""


class Loading:
    """One checkpoint for one process, which may hold a part of the model.

    Args:
        engine: what it is called.
        layout: of the FP8 checkpoint that the engine is told of.
        device: that the model goes to.
        log: below the engine's own loggers, so that its settings hold.
        stages: measured before, of the same load.
    """

    def __init__(
        self,
        engine: str,
        checkpoint: Checkpoint,
        options: Options,
        layout: Format,
        device: torch.device,
        log: logging.Logger,
        stages: Stages,
    ) -> None:
        self.engine, self.checkpoint, self.layout = engine, checkpoint, layout
        # a pattern that matches no tensor may be about layers
        found = matching(options.ignore, checkpoint.tensors)
        self.patterns = LayerPatterns(engine, (pattern for pattern in options.ignore if pattern not in found))
        self.options = dataclasses.replace(options, ignore=found)
        self._device, self._log, self.stages = device, log, stages
        self._experts = find_series(checkpoint)
        self.plan = self._plan()

    def _plan(self) -> Plan:
        """The plan of all tensors, with experts by the names that they are to have."""
        cuts = [cut for experts in self._experts for cut in experts.cuts()]
        options = self.options
        return plan_checkpoint(self.checkpoint, options.recipe, options.staging_bytes, str(self._device), cuts=cuts)

    @property
    def config(self) -> Mapping[str, Any]:
        """The ``quantization_config`` of the checkpoint that the plan would make."""
        return self._config_of(self.plan)

    def _config_of(self, plan: Plan) -> Mapping[str, Any]:
        return self.layout.config(plan, ragged=True)

    def model(self, make: Callable[[Mapping[str, str]], nn.Module], forget: Callable[[], None]) -> nn.Module:
        """A model, filled.

        Args:
            make: makes and fills one in which these layers (by the engine's names) stay unquantized, or raises
                `MakeAnewError`.
            forget: undoes what else making one does.
        """
        kept: dict[str, str] = {}
        while True:
            try:
                return make(kept)
            except MakeAnewError as again:
                stubborn = next((layer for layer in again.keep if layer in kept), None)
                if stubborn is not None:
                    raise RecipeError(
                        f"{stubborn} has to stay unquantized ({kept[stubborn]}), and {self.engine} makes it FP8 all "
                        "the same; leave --load-format and --quantization out"
                    ) from None
                kept.update(again.keep)
            forget()
            gc.collect()  # the model is held by its own cycles

    def survey(
        self,
        model: Any,
        layers: Layers,
        exempt: Collection[str] = (),
        replaced: Callable[[], Collection[str]] = tuple,
    ) -> Survey:
        """What the model's loader does with the checkpoint.

        Args:
            exempt: see `Surveyor`, as for ``replaced``.

        Raises:
            MakeAnewError: the model has to be made anew.
            OctavoError: what can't be done.
        """
        kept, unfit = layers.unquantized(model)
        ask = functools.partial(
            Surveyor,
            model,
            model.load_weights,
            layout=self.layout,
            exempt=exempt,
            replaced=replaced,
            kept={**kept, **unfit},
            engine=self.engine,
        )
        before = self.plan
        self.plan = settle(self._experts, before, self._plan, ask)
        if self.plan is not before and self.config != self._config_of(before):
            raise MakeAnewError({})
        found = ask(self.plan).run()
        self._check(model, found, {*unfit.values()})
        if found.keep:
            names = layers.paths(model)
            raise MakeAnewError({names[module]: why for module, why in found.keep.items()})
        return found

    def check_patterns(self, model: nn.Module, layers: Layers) -> None:
        """Refuse patterns that match neither a tensor nor a layer of this model."""
        tensors, source = [*self.checkpoint.tensors], str(self.checkpoint.path)
        self.patterns.check(model, layers.paths(model), tensors, self._matrices, source)

    def _matrices(self) -> dict[str, str]:
        """All names that matrices of experts in stacks may have -> what all experts of their layer are called."""
        layers = [layer for experts in self._experts for layer in experts.layers]
        cuts = [(layer.base, layer.cut(naming)) for layer in layers for naming in NAMINGS]
        return {matrix.name: base for base, cut in cuts for matrices in cut.values() for matrix in matrices}

    def _check(self, model: nn.Module, found: Survey, unfit: Collection[str]) -> None:
        """Refuse what ``strict`` does not allow: also tensors that stay for the reasons ``unfit``."""
        refused = {p.name: p.reason for p in found.plan.kept if p.reason in unfit} | dict(found.refused)
        if refused and self.options.strict:
            name, why = next(iter(refused.items()))
            raise RecipeError(
                f"{name} can't become FP8 in {type(model).__name__}: {why} ({len(refused)} tensors in all). "
                "Without strict they stay as they are; or ignore them."
            )

    def tell(self, found: Survey) -> None:
        """Log what becomes of the weights."""
        for line in outcome(found):
            self._log.info("octavo: %s", line)
        if said := warning(found):
            self._log.warning("octavo: %s", said)

    def fill(self, found: Survey, load: Callable[[Iterable[tuple[str, Tensor]]], Any], shown: Shown) -> None:
        """Read, quantize and write: into the model's own memory what can go there, the rest by way of ``load``."""
        assert found.places is not None
        tally = Tally()
        with measured(found.plan, shown) as meter, self.stages("stream"):
            meter.follow(tally)
            self._stream(found.places, load, tally, meter.progress)
        notes = [printable(f"note: {note}") for note in self.checkpoint.notes]
        for line in (figures(found.plan, self.stages, tally, meter), *self._computed(found.places), *notes):
            self._log.info("octavo: %s", line)

    def _stream(self, places: Places, load: Callable[..., Any], tally: Tally, progress: _Progress) -> None:
        total = places.direct.source_bytes + places.rest.source_bytes
        before, threads = 0, self.options.threads

        def overall(done: int, of: int) -> None:
            if progress:
                progress(before + done, total)

        if places.direct.placements:
            sink = ParameterSink(places.storages)
            Stream(self.checkpoint, places.direct, sink, threads=threads, tally=tally).run(overall)
        before = places.direct.source_bytes
        if places.rest.placements:
            rest, layout = places.rest, self.layout
            load(iterate(self.checkpoint, rest, layout, threads=threads, progress=overall, tally=tally))
        _release_pinned_memory()

    def _computed(self, places: Places) -> Iterator[str]:
        """A line on what octavo did not stream to its place."""
        if rest := places.rest.placements:
            what = f"{len(rest):,} tensors ({human_bytes(places.rest.source_bytes)}; {rest[0].name}, ...)"
            yield printable(f"{what} went through {self.engine}'s own loader, which computes with them")


def place_among_ranks() -> tuple[int, int]:
    """The number of this process, and of all that hold the model."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _release_pinned_memory() -> None:
    """Give back to the system what the ring's slots were: torch keeps pinned memory, and a server loads once."""
    release = getattr(torch.accelerator, "empty_host_cache", None)  # since torch 2.10
    if release is not None and torch.accelerator.is_available():
        release()
