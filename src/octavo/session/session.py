"""A session: a model whose weight loaders run as they are, while every layer is quantized the moment it is complete.

All state is here and in what it owns, none on modules. What becomes of a write is in `octavo.session.writes`, of a
layer in `octavo.session.finish`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.checkpoint import Checkpoint
from ..choices import DEFAULT_STAGING_BYTES
from ..errors import LoaderError
from ..machine import usable_device
from ..planning.budget import check_options
from ..planning.plan import Plan
from ..planning.recipe import Recipe
from ..streaming.sinks import ParameterSink, Storage
from ..streaming.stream import execute
from ..text import shown
from .claims import claimed
from .finish import Finisher, Provider
from .held import Held
from .inventory import Inventory
from .loading import loading, strangers
from .module_hooks import ModuleHooks
from .pairs import Pair, Pairs, Transform, dummy, load_by_name, load_weights_by, transformed
from .parameters import decide
from .quantize.quantizer import Quantizer
from .record import Loader, Recording, record
from .report import Event, LayerwiseReport, Ledger
from .updating import lent, updating
from .watch.modes import Functions, Operations
from .writes import Writes

Finish = str | Recipe | Mapping[str, Any] | Provider | None


def _checked(model: Any, transform: Any, duplicates: Any, optional: Any) -> tuple[str, ...]:
    """The optional patterns; a `LoaderError` where one of these arguments is of another type than it must be."""
    if not isinstance(model, nn.Module):
        raise LoaderError(f"model is {shown(model)}, not a torch.nn.Module")
    if transform is not None and not callable(transform):
        raise LoaderError(f"transform is {shown(transform)}, not a function of a name and a tensor")
    if duplicates not in ("error", "update"):
        raise LoaderError(f"duplicates is {shown(duplicates)}, not 'error' or 'update'")
    patterns = tuple(optional) if isinstance(optional, Iterable) and not isinstance(optional, str) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise LoaderError(f"optional is {shown(optional)}, not a list of patterns")
    return patterns


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
        optional = _checked(model, transform, duplicates, optional)
        check_options(staging_bytes)
        self.model, self.transform = model, transform
        self.provider: Provider | None = None
        if isinstance(finish, (str, Recipe, Mapping)) or finish is None:
            self.recipe = Recipe.coerce(finish)
        elif callable(finish):
            self.provider, self.recipe = finish, Recipe(None)
        else:
            raise LoaderError(f"finish is {shown(finish)}: not a scheme, a recipe, a function of a layer, or None")
        self.report = LayerwiseReport()
        self.recording: Recording | None = None
        self.loaded = self.failed = False
        # with its index, as tensors have it: loaders compare
        where = None if device is None else torch.empty(0, device=usable_device(device)).device
        self.inventory = Inventory(model, where, optional)
        self._direct, self._duplicates = direct and self.provider is None, duplicates
        self._quantizer, self._ledger = Quantizer(staging_bytes), Ledger()
        self._saw_pairs = False
        self._active: tuple[contextlib.ExitStack, Writes] | None = None
        decide([item for item in self.inventory.items if not self.inventory.is_optional(item)], self.recipe)

    @property
    def events(self) -> list[Event]:
        """Everything that happened since the session was last entered, in order."""
        return self._ledger.events

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        if self._active is not None:
            raise LoaderError("this session is active already")
        if self.failed:
            raise LoaderError("this session's load failed, and left parameters on meta: build model and session anew")
        if self.loaded and self.provider is not None:
            raise LoaderError(
                "layers that a function of yours has finished can't be updated in place: only it knows what it made of "
                "them. Octavo's schemes can."
            )
        self._ledger.events, self._saw_pairs = [], False
        held = Held(self._quantizer, self._ledger, direct=self._direct)
        finish = Finisher(self.inventory, held, self._ledger, self.report, self.provider)
        writes = Writes(self.inventory, held, finish, self._ledger, duplicates=self._duplicates, updating=self.loaded)
        with contextlib.ExitStack() as stack:
            stack.enter_context(claimed(self.inventory))
            if self.loaded:
                stack.enter_context(lent(self.inventory))
                stack.enter_context(updating(self.inventory, writes, self.report))
            else:
                stack.enter_context(loading(self.inventory, writes, self.report))
            stack.enter_context(self._watching(writes))
            self._active = stack.pop_all(), writes
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        assert self._active is not None
        (stack, _), self._active = self._active, None
        self.failed = not self.loaded
        stack.__exit__(kind, error, trace)
        if error is None:
            self.loaded, self.failed = True, False

    @contextlib.contextmanager
    def _watching(self, writes: Writes) -> Iterator[None]:
        """See what loaders do, and raise at the end what one of them has swallowed."""
        hooks, load_weights = ModuleHooks(writes, self.report), load_weights_by(self.model, self.pairs)
        with hooks.active(), load_weights, Functions(writes), Operations(writes):
            yield
        if writes.failure is not None:
            raise writes.failure
        if self.transform is not None and not self._saw_pairs:
            raise LoaderError(
                "transform was given, but saw no pair: the loader's pairs must come through session.pairs(...), or "
                "through model.load_weights"
            )
        if not self.loaded and self.provider is None:
            came = strangers(self.inventory)
            self.report.notes += [f"{path}: a module that came while loading; it stays as it came" for path in came]

    # -- pairs --------------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> Writes:
        if self._active is None:
            raise LoaderError("the session sees no writes before it is entered: load within `with session:`")
        return self._active[1]

    def pairs(self, pairs: Iterable[Pair]) -> Pairs:
        """The pairs, through ``transform``; tells the session where one ends and the next begins."""
        writes, self._saw_pairs = self._writes, True
        return Pairs(writes, pairs, self.transform)

    def load(self, pairs: Iterable[Pair]) -> None:
        """Load pairs by the parameters' own ``weight_loader``, or by a copy: for models without ``load_weights``.

        Raises:
            CoverageError: a name that the model does not have, or a shape that is not the parameter's.
        """
        load_by_name(self.model, self.pairs(pairs))

    def dummy(self, seed: int = 0) -> None:
        """Random weights of the right shapes, layer by layer: for benchmarks without a checkpoint.

        A seed gives the same weights whatever the device. Each matrix is one tensor, of normal numbers times 0.02.
        """
        writes, self._saw_pairs = self._writes, True
        for target, name, values in dummy(self.inventory.layers, seed):
            writes.turn()
            writes.take(name, values)
            target.copy_(values)

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
        if self.provider is not None or self.loaded or self.failed or self._active is not None:
            raise LoaderError("recording is for a session that has not loaded its model, with one of octavo's schemes")
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
        if load is None:
            own = getattr(self.model, "load_weights", None)
            load = own if callable(own) else functools.partial(load_by_name, self.model)
        self.inventory.require()
        with claimed(self.inventory):
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
            writes = self._writes
            with writes.quiet():
                storages = {p.name: Storage.allocate(p) for p in plan.placements}
                self._ledger.hold(plan.final_bytes() - sum(plan.other_bytes.values()))
                execute(recording.checkpoint, plan, ParameterSink(storages), threads=threads)
                items = {item.name: item for item in self.inventory.items}
                for placement in plan.placements:
                    writes.settle_streamed(items[placement.name], placement, storages.pop(placement.name))
            for name, why in recording.online.items():
                self.report.notes.append(f"{name}: loaded online: {why}")
            if recording.online_sources:
                with contextlib.closing(recording.online_pairs()) as pairs:  # also where the loader fails
                    recording.load(self.pairs(pairs))
            self._saw_pairs = True

    def _transforming(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for name, tensor in pairs:
            yield from transformed(self.transform, name, tensor)
