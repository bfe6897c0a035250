"""A session: a model whose weight loaders run as they are, while every layer is quantized the moment it is complete.

All state is here and in what it owns, none on modules. What becomes of a write is in `octavo.layerwise.intake`, of a
layer in `octavo.layerwise.finish`.
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

from .. import modules, schemes
from ..checkpoint import Checkpoint
from ..errors import CoverageError, LoaderError, UpdateError, WeightError, raise_problems
from ..geometry import check_options, usable_device
from ..plan import DEFAULT_STAGING_BYTES, Plan
from ..recipe import Decision, Recipe
from ..ring import now
from ..sinks import ParameterSink, Storage
from ..stream import Stream
from .finish import LayerFinisher, Provider, on_meta, set_tensor
from .intake import Intake
from .items import Face, Inventory, Item, Layer, decide, offset_of
from .modes import Functions, Operations
from .pairs import Pair, Pairs, Transform, load_by_name, transformed
from .record import Loader, Recording, record
from .report import Event, LayerwiseReport, Ledger
from .sources import storage_key
from .storage import QuantizedStorage, Quantizer

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
        decide([item for item in self.inventory.items if not self._is_optional(item)], self.recipe)
        self.intake = self._new_intake()

    @classmethod
    def of_loaded(cls, model: nn.Module, *, follow: bool = True, **options: Any) -> Session:
        """A session whose model is loaded, its quantized layers octavo's own: entering it updates in place.

        Args:
            follow: whether loaders are followed; else the model stays as it is, and boxes come through ``intake.put``.
        """
        session = cls(model, None, **options)
        session._follow = follow
        quantized = {name: (scheme, parts) for name, scheme, parts in modules.quantized_weights(model)}
        session.inventory.drop({modules.scale_name(name) for name in quantized})
        for item in session.inventory.items:
            item.settled = True
            if item.name in quantized:
                scheme, parts = quantized[item.name]
                item.decision = Decision(scheme, "quantized by octavo")
                item.quantized = QuantizedStorage(item.faces[0].tensor, schemes.get(scheme), parts)
                item.dtype, item.cast = torch.float32, False  # which holds whatever comes
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

    def _new_intake(self) -> Intake:
        return Intake(
            self.inventory,
            LayerFinisher(self),
            self.ledger,
            self._quantizer,
            direct=self._direct,
            duplicates=self._duplicates,
            updating=self._updating,
        )

    def __enter__(self) -> Session:
        if self.active:
            raise LoaderError("this session is active already")
        if self.failed:
            raise LoaderError("this session's load failed, and left parameters on meta: build model and session anew")
        self._began, self._saw_pairs, self._updating = now(), False, self.loaded
        self.ledger.events = []
        self._quantizer.forget()
        self.intake = self._new_intake()
        try:
            self._begin_update() if self.updating else self._begin_load()
            self._listen()
        except BaseException:
            self.inventory.untrack()
            if self.updating:
                self._end_update()
            raise
        self.active = True
        return self

    def _listen(self) -> None:
        """See what loaders do, until the stack is closed."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._follow:
                stack.callback(register_module_parameter_registration_hook(self._registered).remove)  # type: ignore[arg-type]
                stack.callback(register_module_buffer_registration_hook(self._replaced).remove)
                stack.callback(self._lend_load_weights())
                stack.enter_context(Functions(self.intake))
                stack.enter_context(Operations(self.intake))
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
        if self.updating and error is not None:
            self._failure = self._update_error(error)
        self.intake.forget()
        self.inventory.untrack()
        for item in self.inventory.items:
            item.make_safe()
        self.report.total_s += now() - self._began
        self.report.peak_bytes, self.report.taken_bytes = self.ledger.peak_bytes, self.ledger.taken_bytes
        if self.updating:
            self.report.updated = [str(lr) for lr in self.inventory.layers if any(item.changed for item in lr.items)]
            self._end_update()
        elif error is None:
            self.loaded = True
            # modules that the loader took out of the model
            self.inventory.drop({item.name for item in self.inventory.items if item.virtual and not item.settled})
        else:
            self.failed = True
            self._abandon(error)

    def _end(self) -> None:
        if self.intake.failure is not None:  # which the loader has swallowed
            raise self.intake.failure
        self.intake.turn()
        if self.transform is not None and not self._saw_pairs:
            raise LoaderError(
                "transform was given, but saw no pair: the loader's pairs must come through session.pairs(...), or "
                "through model.load_weights"
            )
        problems = self._waiting_problems() if self.updating else self._coverage_problems()
        advice = "" if self.updating else "Parameters that are right without a tensor can be named: optional=[...]."
        raise_problems(CoverageError, type(self.model).__name__, problems, advice)
        if not self.updating:
            self._note_strangers()
            present = {id(module) for module in self.model.modules()}
            with self.intake.quiet():
                for layer in self.inventory.layers:
                    if not layer.finished and id(layer.module) in present:  # nothing of it was to be loaded
                        self.intake.finish(layer)
        self._quantizer.check()

    def _note_strangers(self) -> None:
        """Modules that the loader built and put into the model are its own."""
        known = {id(layer.module) for layer in self.inventory.layers}
        for path, module in self.model.named_modules() if self.provider is None else ():
            if id(module) not in known and any(p is not None for p in module._parameters.values()):
                self.report.notes.append(f"{path}: a module that came while loading; it stays as it came")

    def _coverage_problems(self) -> list[str]:
        problems, present = [], {id(module) for module in self.model.modules()}
        for item in self.inventory.items:
            if not item.gaps or (not item.required and item.untouched):
                continue
            if not any(id(face.module) in present for face in item.faces):
                continue  # the loader took the module out of the model
            what = "nothing was loaded" if item.untouched else f"nothing wrote {item.gaps}"
            problems.append(f"{item.name} {list(item.shape)}: {what}")
        return problems

    def _waiting_problems(self) -> list[str]:
        return [
            f"{item.name} {list(item.shape)}: only parts of scale groups came; nothing wrote {item.gaps}"
            for item in self.intake.waiting
        ]

    # -- loading ------------------------------------------------------------------------------------------------------

    def _is_optional(self, item: Item) -> bool:
        return any(fnmatch.fnmatchcase(item.name, pattern) for pattern in self._optional)

    def _require(self) -> None:
        for pattern in self._optional:
            if not any(fnmatch.fnmatchcase(item.name, pattern) for item in self.inventory.items):
                raise CoverageError(f"the optional pattern {pattern!r} matches no parameter")
        for item in self.inventory.items:
            item.required = not self._is_optional(item) and (not item.is_buffer or item.faces[0].tensor.is_meta)

    def _begin_load(self) -> None:
        """Parameters give their memory back, unless their values may be right as they are."""
        self._require()
        stays = {storage_key(item.faces[0].tensor) for item in self.inventory.items if not item.required}
        for item in self.inventory.items:
            face = item.faces[0].tensor
            self.inventory.track(item, face)
            if face.is_meta:
                item.twin = face.detach()
            elif storage_key(face) in stays or not _owns_its_storage(face):
                item.real = face.detach()
                self.ledger.hold(item.nbytes)
                if item.required:
                    self.report.notes.append(f"{item.name}: its memory is shared or not torch's own: it stays")
            else:
                item.twin = torch.empty_strided(item.shape, item.strides, dtype=item.dtype, device="meta")
                self.inventory.track(item, item.twin)
            if not item.scheme and not item.is_buffer:
                self.report.kept[item.name] = item.decision.reason
            item.restart()
        for item in self.inventory.items:
            if item.virtual and not item.faces[0].tensor.is_meta:
                item.give_back()
        for layer in self.inventory.layers:  # tables that the model computes are no layer
            layer.finished = all(item.is_buffer and not item.required for item in layer.items)

    def _abandon(self, error: BaseException) -> None:
        """Nothing that looks loaded: what is not finished, or was found to be bad at the end, is on meta."""
        for item in self.inventory.items:
            bad = isinstance(error, WeightError) and _is_about(error, item)
            if (item.settled and not bad) or not item.virtual:
                continue
            for face in item.faces:
                if bad or not face.tensor.is_meta:
                    set_tensor(item, face, on_meta(item, face))
            item.real = item.quantized = None

    def _registered(self, module: nn.Module, leaf: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """A loader gives a module a parameter; returns the one that takes its place, if there is one."""
        if self.intake.paused or parameter is None or (layer := self.inventory.layer_of(module)) is None:
            return None
        if (final := self.inventory.find_final(parameter)) is not None:
            if parameter is module._parameters.get(leaf):
                return None
            name = f"{layer.name}.{leaf}" if layer.name else leaf
            raise LoaderError(
                f"{name}: a loader ties it to {final[0].name}, whose layer is finished, and holds FP8 numbers. Tie them "  # noqa: E501
                "before the weights come, or keep the weight out of the recipe."
            )
        known = self.inventory.find(parameter)
        if known is not None and known.scheme and not _seen_alike(known, parameter):
            raise LoaderError(
                f"{known.name}: a loader registers it in another shape or order of axes, {list(parameter.shape)}; its "
                "scale groups run along rows as they were. Keep it out of the recipe."
            )
        if known is not None and known.virtual:  # the same parameter in another place, or seen in another shape
            known.faces = [face for face in known.faces if (face.module, face.leaf) != (module, leaf)]
            known.faces.append(Face(module, leaf, parameter))
            return None
        present: nn.Parameter | None = self._replaced(module, leaf, parameter)
        if present is not None:
            return present
        if layer.finished:
            layer = Layer(layer.name, module, late=True)
            self.inventory.layers.append(layer)
        item = self.inventory.add(layer, leaf, parameter)
        if item is None:
            return None
        item.decision = Decision(None, "registered while loading")
        self.report.kept[item.name] = item.decision.reason
        self.inventory.track(item, parameter)
        if parameter.is_meta:
            item.twin = parameter.detach()
            self.intake.reopen(layer)
        else:  # the loader's own: it may hold its values already
            item.required, item.real = False, parameter.detach()
            self.ledger.hold(item.nbytes)
        return None

    def _replaced(self, module: nn.Module, leaf: str, tensor: Tensor | None) -> Any:
        """A loader puts a tensor of its own in an item's place: it is copied there instead."""
        present = module._parameters.get(leaf) if leaf in module._parameters else module._buffers.get(leaf)
        item = None if self.intake.paused or tensor is None else self.inventory.find(present)
        final = None if self.intake.paused or tensor is None else self.inventory.find_final(present)
        if item is None and final is not None:
            item = final[0]
        if tensor is None or present is None or item is None or not (item.virtual or item.settled):
            return None
        if self.inventory.find(tensor) is item:  # the same one, in whatever shape
            return None if item.virtual else present
        if present.shape != tensor.shape:
            raise LoaderError(
                f"{item.name} {list(present.shape)}: a loader puts a tensor of another shape in its place, "
                f"{list(tensor.shape)}"
            )
        if final is not None:
            self.intake.copy_final(*final, present.detach(), tensor.detach())
        else:
            self.intake.copy(item, present.detach(), tensor.detach())
        return present

    # -- pairs --------------------------------------------------------------------------------------------------------

    def _require_active(self) -> None:
        if not self.active:
            raise LoaderError("the session sees no writes before it is entered: load within `with session:`")

    def pairs(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """The pairs, through ``transform``; tells the session where one ends and the next begins."""
        self._require_active()
        self._saw_pairs = True
        return Pairs(self.intake, pairs, self.transform)

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
            with self.intake.quiet():
                storages = {p.name: Storage.allocate(p) for p in plan.placements}
                self.ledger.hold(plan.final_bytes() - sum(plan.other_bytes.values()))
                Stream(recording.checkpoint, plan, ParameterSink(storages), threads=threads).run()
                for placement in plan.placements:
                    self.intake.settle_streamed(placement, storages.pop(placement.name))
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
            self.intake.turn()
            self.intake.take(name, values)
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

    # -- updating in place --------------------------------------------------------------------------------------------

    def _begin_update(self) -> None:
        """Loaders see high-precision parameters again; what they write goes into the FP8 storage that exists."""
        if self.provider is not None:
            raise LoaderError(
                "layers that a function of yours has finished can't be updated in place: only it knows what it made of "
                "them. Octavo's schemes can."
            )
        for item in self.inventory.items:
            item.installed = None
        for item in self.inventory.items:
            item.restart()
            face = item.faces[0]
            if item.scheme:
                module, scale = face.module, modules.scale_name(face.leaf)
                weight, scales = module._parameters.get(face.leaf), module._parameters.get(scale)
                assert item.quantized is not None
                if weight is None or scales is None or weight.dtype != schemes.FP8:
                    raise LoaderError(
                        f"{item.name}: the model no longer has its FP8 numbers and {scale}, so it can't be updated in "
                        "place. Load it anew."
                    )
                item.installed = weight
                # the model may have moved since
                item.quantized.weight, item.quantized.scale, item.device = weight.data, scales.data, weight.device
                lent = on_meta(item, face)
                item.faces, item.twin, item.real = [face._replace(tensor=lent)], lent.detach(), None
                if self._follow:
                    self.inventory.track_final(item, item.quantized.weight)
                    self.inventory.track_final(item, item.quantized.scale)
                    self.inventory.track(item, lent)
                    set_tensor(item, face, lent)
            else:
                holder: Any = face.module._buffers if item.is_buffer else face.module._parameters
                tensor = holder[face.leaf]
                item.twin, item.real, item.required = None, tensor.detach(), not item.is_buffer
                item.offset, item.strides = offset_of(tensor), tuple(tensor.stride())
                self.inventory.track(item, tensor)

    def _end_update(self) -> None:
        """The model has its FP8 parameters again: the same objects, at the same addresses."""
        for item in self.inventory.items:
            if item.installed is not None:
                set_tensor(item, item.faces[0], item.installed)
                item.real = None

    def _update_error(self, error: BaseException) -> UpdateError:
        new: list[str] = []
        old: list[str] = []
        torn: list[str] = []
        waiting = self.intake.unfinished
        for layer in self.inventory.layers:
            items = [item for item in layer.items if not item.is_buffer]
            if not items:
                continue
            fresh = all(not item.gaps and item not in waiting for item in items)
            # on an accelerator, what is not finite shows at the end
            bad = isinstance(error, WeightError) and any(_is_about(error, item) for item in items)
            changed = any(item.changed for item in items)
            group = new if fresh and not bad else torn if changed else old
            group.append(str(layer))
        text = (
            f"the update failed: {error}\n{len(new)} layers have the new weights{_listed(new)}; {len(old)} the old ones"
            f"{_listed(old)}; {len(torn)} some of both{_listed(torn)}. Run the whole update again."
        )
        return UpdateError(text, new, old, torn)


def _seen_alike(item: Item, tensor: Tensor) -> bool:
    return (tuple(tensor.shape), tuple(tensor.stride())) == (item.shape, item.strides)


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""


def _owns_its_storage(tensor: Tensor) -> bool:
    """Whether memory that is given back was this tensor's alone (views of one storage keep it)."""
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _is_about(error: BaseException, item: Item) -> bool:
    return str(error).partition("[")[0] == item.name
