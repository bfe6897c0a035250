"""A session: a model whose weight loaders run as they are, while every layer is quantized the moment it is complete.

All state is here and in what it owns, none on modules. What becomes of a write is in `octavo.session.writes`, of a
layer in `octavo.session.finish`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..checkpoint.checkpoint import Checkpoint
from ..choices import DEFAULT_STAGING_BYTES
from ..errors import CoverageError, LoaderError, raise_problems
from ..machine import now, usable_device
from ..numerics import schemes
from ..planning.budget import check_options
from ..planning.plan import Plan
from ..planning.recipe import Decision, Recipe
from ..running import modules
from ..streaming.sinks import ParameterSink, Storage
from ..streaming.stream import Stream
from . import loading, updating
from .finish import Finisher, Provider
from .held import Held
from .intake import Intake
from .inventory import Inventory
from .module_hooks import ModuleHooks
from .pairs import Pair, Pairs, Transform, load_by_name, transformed
from .parameters import Item, decide
from .quantize.quantizer import Quantizer
from .quantize.storage import QuantizedStorage
from .record import Loader, Recording, record
from .report import Event, LayerwiseReport, Ledger
from .watch.modes import Functions, Operations
from .writes import Writes

Finish = str | Recipe | Mapping[str, Any] | Provider | None


class Session:
    """See `octavo.layerwise`. A context manager; entered again after a load, it updates in place."""

    def __init__(
        self,
        model: nn.Module,
        finish: Finish = "fp8_channel",
        device: str | torch.device | None = None,
        *,
        transform: Transform | None = None,
        direct: bool = True,
        duplicates: str = "error",
        optional: Iterable[str] = (),
        staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        if duplicates not in ("error", "update"):
            raise LoaderError(f"duplicates is {duplicates!r}, not 'error' or 'update'")
        check_options(staging_bytes)
        self.model, self.transform = model, transform
        self.provider: Provider | None = None
        if isinstance(finish, (str, Recipe, Mapping)) or finish is None:
            self.recipe = Recipe.coerce(finish)
        elif callable(finish):
            self.provider, self.recipe = finish, Recipe(None)
        else:
            raise LoaderError(f"finish is {finish!r}: not a scheme, a recipe, a function of a layer, or None")
        self.report, self.ledger = LayerwiseReport(), Ledger()
        self.loaded = self.failed = self.active = False
        # with its index, as tensors have it: loaders compare
        where = None if device is None else torch.empty(0, device=usable_device(device)).device
        self.inventory = Inventory(model, where)
        self._optional = (optional,) if isinstance(optional, str) else tuple(optional)
        self._direct, self._duplicates = direct and self.provider is None, duplicates
        self._quantizer = Quantizer(staging_bytes)
        self._stack = contextlib.ExitStack()
        self.recording: Recording | None = None
        self._follow = True
        self._saw_pairs = self._updating = False
        self._began = 0.0
        self._emptied: list[Tensor] = []
        self._lent: list[tuple[Item, Tensor]] = []
        decide([item for item in self.inventory.items if not self._is_optional(item)], self.recipe)
        self.writes = self._new_writes()

    @classmethod
    def of_loaded(cls, model: nn.Module, *, follow: bool = True, **options: Any) -> Session:
        """A session whose model is loaded, its quantized layers octavo's own: entering it updates in place.

        Args:
            follow: whether loaders are followed; else the model stays as it is, and boxes come through `Intake.put`.
        """
        session = cls(model, None, **options)
        session._follow = follow
        quantized = {name: (scheme, parts) for name, scheme, parts in modules.quantized_weights(model)}
        session.inventory.drop({modules.scale_name(name) for name in quantized})
        for item in session.inventory.items:
            item.settle()
            if item.name in quantized:
                scheme, parts = quantized[item.name]
                item.decision = Decision(scheme, "quantized by octavo")
                module, leaf, weight = item.faces[0]
                scale = module.get_parameter(modules.scale_name(leaf))
                item.adopt(QuantizedStorage(item.name, weight.data, schemes.get(scheme), parts, scale.data))
                item.dtype = torch.float32  # which holds whatever comes
        session.loaded = True
        return session

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def events(self) -> list[Event]:
        """What happened, in order, since the session was last entered."""
        return self.ledger.events

    @property
    def updating(self) -> bool:
        """Whether this use of the session updates a model that it has loaded."""
        return self._updating

    def _new_writes(self) -> Writes:
        held = Held(self._quantizer, self.ledger, direct=self._direct, cast=self._follow)
        finish = Finisher(self.inventory, held, self.ledger, self.report, self.provider)
        intake = Intake(held, finish, self.ledger, duplicates=self._duplicates, updating=self._updating)
        return Writes(self.inventory, intake)

    def __enter__(self) -> Session:
        if self.active:
            raise LoaderError("this session is active already")
        if self.failed:
            raise LoaderError("this session's load failed, and left parameters on meta: build model and session anew")
        self._began, self._saw_pairs, self._updating = now(), False, self.loaded
        self.ledger.events = []
        self.writes = self._new_writes()
        try:
            self._begin()
            self._listen()
        except BaseException:
            self.inventory.untrack()
            updating.take_back(self._lent)
            raise
        self.active = True
        self.writes.origins.following = self._follow
        return self

    def _begin(self) -> None:
        self._emptied, self._lent = [], []
        if not self.updating:
            self._require()
            self._emptied = loading.begin(self.inventory, self.ledger, self.report)
            return
        if self.provider is not None:
            raise LoaderError(
                "layers that a function of yours has finished can't be updated in place: only it knows what it made of "
                "them. Octavo's schemes can."
            )
        self._lent = updating.lend(self.inventory, follow=self._follow)

    def _listen(self) -> None:
        """See what loaders do, until the stack is closed."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._follow:
                hooks = ModuleHooks(self.writes, self.report, self._is_optional)
                stack.callback(register_module_parameter_registration_hook(hooks.parameter).remove)  # type: ignore[arg-type]
                stack.callback(register_module_buffer_registration_hook(hooks.buffer).remove)
                stack.callback(self._lend_load_weights())
                stack.enter_context(Functions(self.writes))
                stack.enter_context(Operations(self.writes))
            self._stack = stack.pop_all()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self._end()
        except BaseException as found:
            self._leave(found)
            if self.updating and isinstance(found, Exception):
                raise self._failure from found
            raise
        self._leave(error)
        if self.updating and isinstance(error, Exception):
            raise self._failure from error

    def _leave(self, error: BaseException | None) -> None:
        """The model without us: loaded, or with nothing that looks loaded."""
        self.active = False
        self._stack.close()
        if error is not None:
            with contextlib.suppress(RuntimeError):  # the error that we have comes first
                self._quantizer.press()
        if self.updating and error is not None:
            unfinished = {item.name for item in self.writes.intake.held.unfinished}
            lost = {what.parameter for what in self._quantizer.lost if isinstance(what, Event)}
            self._failure = updating.update_error(self.inventory, unfinished, lost, error)
        self.writes.forget()
        self.inventory.untrack()
        loading.make_safe(self._emptied)
        self._quantizer.close()
        self.report.total_s += now() - self._began
        self.report.peak_bytes, self.report.taken_bytes = self.ledger.peak_bytes, self.ledger.taken_bytes
        if self.updating:
            self.report.updated = [str(lr) for lr in self.inventory.layers if any(item.changed for item in lr.items)]
            updating.take_back(self._lent)
        elif error is None:
            self.loaded = True
            # modules that the loader took out of the model
            self.inventory.drop({item.name for item in self.inventory.items if item.virtual and not item.settled})
        else:
            self.failed = True
            loading.abandon(self.inventory, error)

    def _end(self) -> None:
        if self.writes.failure is not None:  # which the loader has swallowed
            raise self.writes.failure
        self.writes.turn()
        if self.transform is not None and not self._saw_pairs:
            raise LoaderError(
                "transform was given, but saw no pair: the loader's pairs must come through session.pairs(...), or "
                "through model.load_weights"
            )
        problems = (
            self.writes.intake.held.waiting_problems() if self.updating else loading.coverage_problems(self.inventory)
        )
        advice = "" if self.updating else "Parameters that are right without a tensor can be named: optional=[...]."
        raise_problems(CoverageError, type(self.model).__name__, problems, advice)
        if not self.updating:
            if self.provider is None:
                came = loading.strangers(self.inventory)
                self.report.notes += [f"{path}: a module that came while loading; it stays as it came" for path in came]
            present = {id(module) for module in self.model.modules()}
            with self.writes.quiet():
                for layer in self.inventory.layers:
                    if not layer.finished and id(layer.module) in present:  # nothing of it was to be loaded
                        self.writes.intake.finish(layer)
        with self.writes.quiet():
            self._quantizer.check()

    # -- loading ------------------------------------------------------------------------------------------------------

    def _is_optional(self, item: Item) -> bool:
        return any(fnmatch.fnmatchcase(item.name, pattern) for pattern in self._optional)

    def _require(self) -> None:
        for pattern in self._optional:
            if not any(fnmatch.fnmatchcase(item.name, pattern) for item in self.inventory.items):
                raise CoverageError(f"the optional pattern {pattern!r} matches no parameter")
        for item in self.inventory.items:
            item.required = not self._is_optional(item) and (not item.is_buffer or item.faces[0].tensor.is_meta)

    # -- pairs --------------------------------------------------------------------------------------------------------

    def _require_active(self) -> None:
        if not self.active:
            raise LoaderError("the session sees no writes before it is entered: load within `with session:`")

    def pairs(self, pairs: Iterable[Pair]) -> Pairs:
        """The pairs, through ``transform``; tells the session where one ends and the next begins."""
        self._require_active()
        self._saw_pairs = True
        return Pairs(self.writes, pairs, self.transform)

    def load(self, pairs: Iterable[Pair]) -> None:
        """Load pairs by the parameters' own ``weight_loader``, or by a copy: for models without ``load_weights``.

        Raises:
            CoverageError: a name that the model does not have, or a shape that is not the parameter's.
        """
        load_by_name(self.model, self.pairs(pairs))

    # -- from a plan --------------------------------------------------------------------------------------------------

    def record(self, path: str | os.PathLike[str] | Checkpoint, load: Loader | None = None) -> Plan:
        """Run the loader once on symbols made from a checkpoint's headers: the plan of what it does on this rank.

        `stream` then carries it out. ``session.recording.online`` says which parameters the loader has to load itself,
        since it computes them, and why.

        Args:
            load: the loading function, given pairs; default: ``model.load_weights``, or by name where there is none.

        Raises:
            CoverageError: before a weight is read: whatever is missing, written twice or of another shape.
            LoaderError: the loader needs values where there are none; or layers are finished by a function of yours.
        """
        if self.provider is not None or self.loaded or self.active or self.failed:
            raise LoaderError("recording is for a session that has not loaded its model, with one of octavo's schemes")
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        if load is None:
            own = getattr(self.model, "load_weights", None)
            load = own if callable(own) else functools.partial(load_by_name, self.model)
        self._require()
        self.recording = record(
            self.inventory, checkpoint, self.recipe, load, self._transforming, self._quantizer.staging_bytes
        )
        return self.recording.plan

    def stream(self, plan: Plan, threads: int | None = None) -> None:
        """Load the model by a plan that `record` made: only the slices of this rank are read, straight into FP8.

        Errors as for `octavo.load`, and those of loading online.
        """
        recording = self.recording
        if recording is None or recording.plan is not plan:
            raise LoaderError("this plan was not recorded by this session")
        with self:
            with self.writes.quiet():
                storages = {p.name: Storage.allocate(p) for p in plan.placements}
                self.ledger.hold(plan.final_bytes() - sum(plan.other_bytes.values()))
                Stream(recording.checkpoint, plan, ParameterSink(storages), threads=threads).run()
                items = {item.name: item for item in self.inventory.items}
                for placement in plan.placements:
                    self.writes.intake.settle_streamed(items[placement.name], placement, storages.pop(placement.name))
            for name, why in recording.online.items():
                self.report.notes.append(f"{name}: loaded online: {why}")
            if recording.online_sources:
                recording.load(self.pairs(recording.online_pairs()))
            self._saw_pairs = True

    def _transforming(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for name, tensor in pairs:
            yield from transformed(self.transform, name, tensor)

    def dummy(self, seed: int = 0) -> None:
        """Random weights of the right shapes, layer by layer: for benchmarks without a checkpoint.

        A seed gives the same weights whatever the device. Each matrix is one tensor, of normal numbers times 0.02.
        """
        self._require_active()
        generator = torch.Generator("cpu").manual_seed(seed)

        def pairs() -> Iterator[tuple[Tensor, Pair]]:
            for layer in self.inventory.layers:
                for item in layer.items:
                    if not item.required or not item.gaps:
                        continue
                    target = item.faces[0].tensor.detach()
                    for index in itertools.product(*map(range, item.shape[:-2])):
                        shape = item.shape[len(index) :]
                        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.02
                        yield target[index] if index else target, (item.name, values.to(item.dtype))

        for target, (name, values) in pairs():
            self.writes.turn()
            self.writes.take(name, values)
            target.copy_(values)
        self._saw_pairs = True

    def _lend_load_weights(self) -> Callable[[], None]:
        """While the session lasts, ``model.load_weights(pairs)`` reads its pairs through the session."""
        attributes, name = self.model.__dict__, "load_weights"
        original = getattr(self.model, name, None)
        if not callable(original):
            return lambda: None
        before = {name: attributes[name]} if name in attributes else {}

        def load_weights(pairs: Iterable[Pair], *args: Any, **kwargs: Any) -> Any:
            return original(pairs if isinstance(pairs, Pairs) else self.pairs(pairs), *args, **kwargs)

        attributes[name] = load_weights

        def restore() -> None:
            del attributes[name]
            attributes.update(before)

        return restore
