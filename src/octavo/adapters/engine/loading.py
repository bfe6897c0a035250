"""A checkpoint on its way into a model that an engine makes. Imports no engine.

    plan     what becomes of all tensors of the checkpoint
    model    made by the engine, for the config of the FP8 checkpoint that the plan would make
    survey   dry runs: what goes where, whether all of it is there
    stream   through octavo's ring, quantized on the model's device, into the model's memory; what the engine's loader
             computes through the model's own ``load_weights``

Where a survey shows that some layer has to stay unquantized, the model is made a second time. Plan and survey may be
remembered from an earlier start: see `remembered`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...checkpoint.checkpoint import Checkpoint
from ...choices import AUTO
from ...conversion.formats import Format
from ...conversion.iterate import iterate
from ...errors import RecipeError
from ...planning.plan import Plan, plan_checkpoint
from ...planning.recipe import matching
from ...planning.stacks import Series, find_series
from ...streaming.meter import Stages, measured
from ...streaming.sinks import ParameterSink
from ...streaming.stream import Stream, Tally
from ...text import human_bytes, printable
from ..remembering import facts
from .experts import matrices_of, settle
from .filling import check_all_filled, targets_of
from .layers import LayerPatterns
from .left import Calls, Watch
from .log import figures, notes, outcome, warning
from .options import Options
from .placing import Places
from .record import Record
from .remembered import Entry, remembering
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
        options: with a scheme, see `Options.settled`.
        layout: of the FP8 checkpoint that the engine is told of.
        device: that the model goes to.
        log: below the engine's own loggers, so that its settings hold.
        stages: measured before, of the same load.
        depends: words for what of the engine a survey depends on; where there are none, nothing is remembered.
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
        depends: Callable[[], str] | None = None,
    ) -> None:
        assert options.scheme != AUTO
        self.engine, self.checkpoint, self.layout = engine, checkpoint, layout
        # a pattern that matches no tensor may be about layers
        found = matching(options.ignore, checkpoint.tensors)
        self.patterns = LayerPatterns(engine, (pattern for pattern in options.ignore if pattern not in found))
        self.options = dataclasses.replace(options, ignore=found)
        self._device, self._log, self.stages = device, log, stages
        about = [engine, repr(options), layout.name, facts.of_device(device)]
        self._memory = remembering(checkpoint, about, depends, log) if depends and options.remember else None
        self._recalled = self._memory.recall() if self._memory else None  # until the model is known to be that one
        self._is_recalled = False
        self._shown: Entry | None = None  # to be remembered
        self._kept = dict(self._recalled.kept) if self._recalled else {}  # layers of the model that stay -> why
        self._told: tuple[Plan, Mapping[str, Any]] | None = None
        self._namings = self._recalled.namings if self._recalled else ()

    @functools.cached_property
    def _experts(self) -> list[Series]:
        experts = find_series(self.checkpoint)
        for series, naming in zip(experts, self._namings, strict=False):
            series.naming = naming
        return experts

    @functools.cached_property
    def plan(self) -> Plan:
        """Of all tensors, as the recipe and the model have them."""
        return self._plan()

    def _plan(self) -> Plan:
        """The plan of all tensors, with experts by the names that they are to have."""
        cuts = [cut for experts in self._experts for cut in experts.cuts()]
        options, veto = self.options, self.layout.unpackable
        return plan_checkpoint(
            self.checkpoint, options.recipe, options.staging_bytes, str(self._device), veto=veto, cuts=cuts
        )

    @property
    def plan_to_make_by(self) -> Plan | None:
        """The plan; None where the layers that stay are all known from an earlier start."""
        return self.plan if self._recalled is None else None

    @property
    def config(self) -> Mapping[str, Any]:
        """The ``quantization_config`` of the checkpoint that the plan would make."""
        return self._config_of(self.plan) if self._recalled is None else self._recalled.config

    def _config_of(self, plan: Plan) -> Mapping[str, Any]:
        if self._told is None or self._told[0] is not plan:
            self._told = plan, self.layout.config(plan, ragged=True)
        return copy.deepcopy(self._told[1])  # engines change what they are given

    def model(self, make: Callable[[Mapping[str, str]], nn.Module], forget: Callable[[], None]) -> nn.Module:
        """A model, filled.

        Args:
            make: makes and fills one in which these layers (by the engine's names) stay unquantized, or raises
                `MakeAnewError`.
            forget: undoes what else making one does.
        """
        kept = self._kept
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
            except Exception as error:
                if self._recalled is None:
                    raise
                self._log.info("octavo: what was remembered does not fit, and the plan is made anew (%s)", error)
                self._forget_all()
            forget()
            gc.collect()  # the model is held by its own cycles

    def survey(
        self,
        model: Any,
        layers: Layers,
        exempt: Collection[str] = (),
        replaced: Callable[[], Collection[str]] = tuple,
        planned: Mapping[str, str] = MappingProxyType({}),
        calls: Calls = str,
    ) -> Survey:
        """What the model's loader does with the checkpoint.

        Args:
            exempt: see `Surveyor`, as for ``replaced``.
            planned: layers that were made unquantized because of the plan (by the engine's names) -> why.
            calls: see `Watch`.

        Raises:
            MakeAnewError: the model has to be made anew.
            OctavoError: what can't be done.
        """
        kept, unfit = layers.unquantized(model)
        if self._recalled is not None:
            return self._recall(model, self._recalled, {*unfit.values()}, lambda: {*exempt, *replaced()}, calls)
        watch = self._watch(model, calls)
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
        if watch is not None:
            self._shown = self._entry(model, watch, found, planned)
        return found

    # -- from one start to the next -----------------------------------------------------------------------------------

    def _recall(
        self,
        model: Any,
        entry: Entry,
        unfit: Collection[str],
        unneeded: Callable[[], Collection[str]],
        calls: Calls,
    ) -> Survey:
        """The survey of an earlier start. Errors, of whatever kind, mean that it is not one of this model."""
        assert self._memory is not None
        found = self._memory.restore(entry, self._record(model), model.load_weights, calls)
        filled = targets_of(found.fillers) | {target for target, *_ in entry.survey["constants"]}
        check_all_filled(model, filled, unneeded())
        self._check(model, found, unfit)
        self._recalled, self._is_recalled = None, True
        return found

    def _watch(self, model: nn.Module, calls: Calls) -> Watch | None:
        if self._memory is None:
            return None
        try:
            return Watch(model, calls)
        except Exception as error:  # of objects of others that are looked at
            self._log.info("octavo: the plan can't be remembered: %s: %s", type(error).__name__, error)
            return None

    def _entry(self, model: Any, watch: Watch, found: Survey, planned: Mapping[str, str]) -> Entry | None:
        """What a later start needs; None where it could not do without dry runs."""
        try:
            left, namings = vars(watch.left(found, model.load_weights)), [series.naming for series in self._experts]
            survey, kept = self._record(model).write(found), {**planned, **self._kept}
            return Entry(self.config, kept, namings, watch.digest, left, survey, {})
        except Exception as error:  # the same
            self._log.info("octavo: the plan can't be remembered: %s: %s", type(error).__name__, error)
            return None

    def _record(self, model: nn.Module) -> Record:
        checkpoint, options = self.checkpoint, self.options
        unused, notes = dict(checkpoint.left_out), checkpoint.notes
        bare = Plan(str(checkpoint.path), options.recipe, (), unused, options.staging_bytes, {}, notes)
        return Record(checkpoint, model, bare, self.layout, str(self._device))

    def _forget_all(self) -> None:
        self._recalled, self._namings = None, ()
        self._kept.clear()
        self.__dict__.pop("_experts", None)
        self.__dict__.pop("plan", None)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def check_patterns(self, model: nn.Module, layers: Layers) -> None:
        """Refuse patterns that match neither a tensor nor a layer of this model."""
        if not self.patterns.unmatched:
            return
        tensors, source = [*self.checkpoint.tensors], str(self.checkpoint.path)
        self.patterns.check(model, layers.paths(model), tensors, lambda: matrices_of(self._experts), source)

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
        if self._is_recalled:
            self._log.info("octavo: plan remembered from an earlier start (%.2f s)", self.stages.seconds["plan"])
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
        said = [printable(f"note: {note}") for note in notes(found.plan, self.options.offered())]
        for line in (figures(found.plan, self.stages, tally, meter), *self._computed(found.places), *said):
            self._log.info("octavo: %s", line)
        if self._memory is not None and self._shown is not None:
            self._memory.keep(self._shown)

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
