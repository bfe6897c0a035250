"""``--load-format octavo``: a model of vLLM, filled with FP8 from a bf16 checkpoint.

    config   the quantization config of a compressed-tensors checkpoint
    model    made by vLLM, with parameters that hold FP8
    survey   dry runs: what goes where, whether all of it is there
    stream   through octavo's ring, quantized on the model's device, into the model's memory; what the loader computes
             through the model's own ``load_weights``

Where a dry run shows that some layer has to stay unquantized, the model is made a second time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from ...checkpoint.checkpoint import Checkpoint
from ...choices import DEFAULT_FORMAT
from ...conversion import formats
from ...conversion.iterate import iterate
from ...errors import RecipeError
from ...planning.plan import Plan, plan_checkpoint
from ...planning.recipe import matching
from ...planning.stacks import find_series
from ...streaming.meter import Stages, collection_paused, measured
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from ...streaming.sinks import ParameterSink
from ...streaming.stream import Stream, Tally
from ...text import human_bytes, printable
from ..engine.experts import settle
from ..engine.log import figures, outcome, warning
from ..engine.names import LOAD_FORMAT, PREFIX, scheme_of_quantization
from ..engine.placing import Places
from ..engine.survey import Survey, Surveyor
from ..engine.updating import CheckpointWeights
from . import config as quantization
from . import drafts, versions
from . import reloading as reload
from .config import OctavoConfig
from .layers import LayerPatterns
from .options import Options
from .telling import telling

Progress = Callable[[int, int], None] | None
# below vLLM's own loggers, so that its settings hold for ours
log = init_logger("vllm.octavo")


class _MakeAnewError(Exception):
    """Some layers have to stay unquantized, which the model that was made does not do."""

    def __init__(self, keep: Mapping[str, str]) -> None:
        super().__init__(", ".join(keep))
        self.keep = keep


class OctavoLoader(DefaultModelLoader):  # type: ignore[misc]
    """Errors are `OctavoError`, raised before a weight is read, and leave no model behind."""

    @telling
    def __init__(self, load_config: Any) -> None:
        # what the extra config and --quantization say together is checked when both are known
        self.extra = load_config.model_loader_extra_config
        inner = copy.copy(load_config)
        inner.load_format, inner.model_loader_extra_config = "safetensors", {}
        super().__init__(inner)
        self.options = Options.parse(self.extra)
        self.stages = Stages()

    # -- the model ----------------------------------------------------------------------------------------------------

    @telling
    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Make the model and fill it. Errors: see `Options.parse`, `Checkpoint.open`, `Surveyor.run`."""
        self.is_draft = drafts.is_draft(vllm_config, model_config)
        if self.is_draft:
            vllm_config = drafts.without_config(vllm_config)
            if not scheme_of_quantization(model_config.quantization):
                unquantized: nn.Module = drafts.stock(self.load_config).load_model(vllm_config, model_config, prefix)
                return unquantized
        with drafts.naming(vllm_config, model_config):
            return self._load(vllm_config, model_config, prefix)

    def _load(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> nn.Module:
        self.vllm_config = vllm_config
        parse = drafts.options_of if self.is_draft else Options.parse
        self.options = parse(self.extra, model_config.quantization)
        self.quant_config = self._quant_config(vllm_config, model_config)
        self.device = self._device(vllm_config)
        with collection_paused(), contextlib.ExitStack() as self.warming:
            self._warm_up()
            return self._load_model(vllm_config, model_config, prefix)

    def _load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str) -> nn.Module:
        with self.stages("plan"):
            self.checkpoint = self._open(model_config)
            if self.is_draft:
                self.options = drafts.fitting(self.options, self.checkpoint)
            self.experts = find_series(self.checkpoint)
            self.quant_config.layers = self._layer_patterns()
            self.plan = self._plan()
        self._read_ahead()
        kept: dict[str, str] = {}
        forget_layers = versions.remember_layers(vllm_config)
        while True:
            self.quant_config.fill(self._config(self.plan), kept)
            try:
                with self.quant_config.used():
                    model: nn.Module = super().load_model(vllm_config, model_config, prefix)
                return model
            except _MakeAnewError as again:
                stubborn = next((layer for layer in again.keep if layer in kept), None)
                if stubborn is not None:
                    raise RecipeError(
                        f"{stubborn} has to stay unquantized ({kept[stubborn]}), and vLLM makes it FP8 all the same; "
                        "leave --load-format and --quantization out"
                    ) from None
                kept.update(again.keep)
            forget_layers()
            gc.collect()  # the model is held by its own cycles

    def _warm_up(self) -> None:
        """Pinned memory and kernels, while the model is planned and made."""
        options = self.options
        self.warming.enter_context(WarmUp(self.device, options.staging_bytes, options.threads, [options.scheme]))

    def _read_ahead(self) -> None:
        """What the page cache lacks, while the model is made."""
        rank, ranks = _place_among_ranks()
        self.warming.enter_context(ReadAhead(self.checkpoint.shards, rank / ranks))

    def _quant_config(self, vllm_config: VllmConfig, model_config: ModelConfig) -> OctavoConfig:
        """The config that vLLM made from ``--quantization``, or one made now, as vLLM would."""
        if getattr(model_config, "quantization_config", None) is not None:
            raise RecipeError(
                "--quantization-config is for vLLM's own online quantization, which has nothing to do where octavo "
                "quantizes; leave it out"
            )
        found = vllm_config.quant_config
        if isinstance(found, OctavoConfig):
            return found
        if found is not None:
            how = "" if model_config.quantization is None else f" ({model_config.quantization})"
            raise RecipeError(
                f"--load-format {LOAD_FORMAT} quantizes bf16 checkpoints, and {model_config.model} is served quantized "
                f"already{how}: leave --load-format out to serve it so, or start from the bf16 checkpoint without "
                "--quantization."
            )
        model_config.quantization = PREFIX + self.options.scheme
        # as vLLM's own lookup does, which imports all quantizations that it knows, for 0.3 s; it takes any dtype
        made = quantization.CONFIGS[self.options.scheme]()
        self._check_capability(made)
        vllm_config.quant_config = made
        custom_ops = vllm_config.compilation_config.custom_ops
        if made.has_blocked_weights() and "-quant_fp8" not in custom_ops and "+quant_fp8" not in custom_ops:
            custom_ops.append("+quant_fp8")  # as vLLM does when it knows early
        return made

    def _check_capability(self, made: OctavoConfig) -> None:
        capability = current_platform.get_device_capability()
        if capability is not None and capability.to_int() < made.get_min_capability():
            raise RecipeError(
                f"{self.options.scheme} needs a GPU of compute capability {made.get_min_capability() / 10}, not "
                f"{capability.as_version_str()}"
            )

    def _device(self, vllm_config: VllmConfig) -> torch.device:
        """The device that the model goes to."""
        named = torch.device(self.load_config.device or vllm_config.device_config.device)
        return torch.empty(0, device=named).device  # with the number of the current one: each thread has its own

    # -- the checkpoint -----------------------------------------------------------------------------------------------

    def _open(self, model_config: ModelConfig) -> Checkpoint:
        local = Path(model_config.model)
        if local.is_dir():
            return Checkpoint.open(local)
        files = versions.files_of(self, DefaultModelLoader.Source(model_config.model, model_config.revision))
        return Checkpoint.open_chosen(files)

    def _plan(self) -> Plan:
        """The plan of all tensors, with experts by the names that they are to have."""
        cuts = [cut for experts in self.experts for cut in experts.cuts()]
        options = self.options
        return plan_checkpoint(self.checkpoint, options.recipe, options.staging_bytes, str(self.device), cuts=cuts)

    def _layer_patterns(self) -> LayerPatterns:
        """The patterns of ``ignore`` that match no tensor, which then are no longer among the options."""
        given = self.options.ignore
        found = matching(given, self.checkpoint.tensors)
        self.options = dataclasses.replace(self.options, ignore=found)
        return LayerPatterns(pattern for pattern in given if pattern not in found)

    def _config(self, plan: Plan) -> Mapping[str, Any]:
        """The config of the checkpoint that a plan would make."""
        return formats.get(DEFAULT_FORMAT).config(plan, ragged=True)

    # -- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Survey, then read and fill."""
        layout = formats.get(DEFAULT_FORMAT)
        with self.stages("plan"):
            found = self.survey(model, model_config, layout)
        assert found.places is not None
        for line in outcome(found):
            log.info("octavo: %s", line)
        if said := warning(found):
            log.warning("octavo: %s", said)
        self.warming.close()
        tally = Tally()
        with measured(found.plan, self._progress()) as meter, self.stages("stream"):
            meter.follow(tally)
            self._stream(model, found.places, layout, tally, meter.progress)
        notes = [printable(f"note: {note}") for note in self.checkpoint.notes]
        for line in (figures(found.plan, self.stages, tally, meter), *_computed(found.places), *notes):
            log.info("octavo: %s", line)
        reload.prepare(model, self.checkpoint, found.plan, layout, found.fillers)

    def survey(self, model: Any, model_config: ModelConfig, layout: formats.Format) -> Survey:
        """What the model's loader does with the checkpoint. Refuse what can't be done; have the model made anew."""
        if tuple(getattr(model, "secondary_weights", ())):
            raise RecipeError(
                f"{model_config.model}: {type(model).__name__} reads several checkpoints, which octavo does not; leave "
                "--load-format and --quantization out"
            )
        self._check_patterns(model)
        kept, unfit = self.quant_config.unquantized(model)
        ask = functools.partial(
            Surveyor,
            model,
            model.load_weights,
            layout=layout,
            exempt=versions.exempt(model),
            replaced=functools.partial(drafts.replaced, self.vllm_config, model, model_config),
            kept={**kept, **unfit},
            engine="vLLM",
        )
        with versions.unheard():
            before, self.plan = self.plan, settle(self.experts, self.plan, self._plan, ask)
            if self.plan is not before and self._config(self.plan) != self._config(before):
                raise _MakeAnewError({})
            found = ask(self.plan).run()
        self._check(model, found, {*unfit.values()})
        return found

    def _stream(self, model: Any, places: Places, layout: formats.Format, tally: Tally, progress: Progress) -> None:
        """Into the model's own memory what can go there, the rest through its loader."""
        total = places.direct.source_bytes + places.rest.source_bytes
        before = 0

        def overall(done: int, of: int) -> None:
            if progress:
                progress(before + done, total)

        if places.direct.placements:
            sink = ParameterSink(places.storages)
            Stream(self.checkpoint, places.direct, sink, threads=self.options.threads, tally=tally).run(overall)
        before = places.direct.source_bytes
        if places.rest.placements:
            threads = self.options.threads
            weights = iterate(self.checkpoint, places.rest, layout, threads=threads, progress=overall, tally=tally)
            model.load_weights(weights)
        versions.release_pinned_memory()

    def _check_patterns(self, model: nn.Module) -> None:
        if self.vllm_config.parallel_config.pipeline_parallel_size > 1:
            return  # a layer may be another rank's
        paths = self.quant_config.paths(model)
        parts = [
            f"{layer}.{name}"
            for path, layer in paths.items()
            for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        ]
        self.quant_config.layers.check([*paths.values()], parts, [*self.checkpoint.tensors], str(self.checkpoint.path))

    def _check(self, model: nn.Module, found: Survey, unfit: Collection[str]) -> None:
        """Have the model made anew, if it must be, or refuse. Tensors with the reasons ``unfit`` are in layers that are
        not FP8 since vLLM can't make them so."""
        refused = {p.name: p.reason for p in found.plan.kept if p.reason in unfit} | dict(found.refused)
        if refused and self.options.strict:
            name, why = next(iter(refused.items()))
            raise RecipeError(
                f"{name} can't become FP8 in {type(model).__name__}: {why} ({len(refused)} tensors in all). "
                "Without strict they stay as they are; or ignore them."
            )
        if not found.keep:
            return
        names = self.quant_config.paths(model)
        raise _MakeAnewError({names[module]: why for module, why in found.keep.items()})

    def _progress(self) -> bool | None:
        if not self.load_config.use_tqdm_on_load:
            return False
        return None if _place_among_ranks()[0] == 0 else False

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """For reloading: the weights of a checkpoint, unquantized, as vLLM expects them."""
        return CheckpointWeights(self._open(model_config), model, self.options)


def _place_among_ranks() -> tuple[int, int]:
    """The number of this process, and of all that hold the model."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _computed(places: Places) -> Iterator[str]:
    """A line on what octavo did not stream to its place."""
    if rest := places.rest.placements:
        what = f"{len(rest):,} tensors ({human_bytes(places.rest.source_bytes)}; {rest[0].name}, ...)"
        yield printable(f"{what} went through vLLM's own loader, which computes with them")


def switching(loader: type[DefaultModelLoader]) -> type[DefaultModelLoader]:
    """The loader, except where ``--quantization`` is octavo's."""
    if issubclass(loader, _Switch):
        return loader
    return type(loader.__name__, (_Switch, loader), {"__module__": __name__, "__doc__": loader.__doc__})


class _Switch:
    """Hands a model over to `OctavoLoader` if its quantization is octavo's, and does nothing else."""

    load_config: Any

    def __init__(self, load_config: Any) -> None:
        self._given, extra = load_config, load_config.model_loader_extra_config
        if isinstance(extra, dict) and extra.keys() & Options.names():
            load_config = copy.copy(load_config)  # which vLLM would not know
            load_config.model_loader_extra_config = {}
        super().__init__(load_config)  # type: ignore[call-arg]

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> Any:
        if scheme_of_quantization(model_config.quantization):
            return OctavoLoader(self._given).load_model(vllm_config, model_config, prefix)
        if self._given is not self.load_config and not drafts.is_asked_for(vllm_config):
            raise RecipeError(
                f"--model-loader-extra-config {self._given.model_loader_extra_config} is for --load-format "
                f"{LOAD_FORMAT}, not {self._given.load_format}"
            )
        return super().load_model(drafts.without_config(vllm_config), model_config, prefix)  # type: ignore[misc]

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Any:
        if scheme_of_quantization(model_config.quantization):
            return OctavoLoader(self._given).get_all_weights(model_config, model)
        return super().get_all_weights(model_config, model)  # type: ignore[misc]
