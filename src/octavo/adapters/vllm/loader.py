"""``--load-format octavo``: a model of vLLM, filled with FP8 from a bf16 checkpoint.

    config   the quantization config of a compressed-tensors checkpoint
    model    made by vLLM, with parameters that hold FP8
    survey   dry runs: what goes where, whether all of it is there
    stream   through octavo's ring, quantized on the model's device, into the model's memory; what the loader computes
             through the model's own ``load_weights``

All but the model is `octavo.adapters.engine.loading`'s, for every engine.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.quantized import KEYS as QUANTIZATION_KEYS
from ...errors import RecipeError
from ...streaming.meter import Stages, collection_paused
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from ...text import printable
from ..engine.loading import Loading, place_among_ranks
from ..engine.names import LOAD_FORMAT, PREFIX, scheme_of_quantization
from ..engine.survey import Survey
from ..engine.updating import CheckpointWeights
from . import config as quantization
from . import drafts, versions
from . import reloading as reload
from .caches import unused_scales, with_scales_of_caches
from .config import OctavoConfig
from .options import Options
from .telling import telling

# below vLLM's own loggers, so that its settings hold for ours
log = init_logger("vllm.octavo")


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
        options = parse(self.extra, model_config.quantization)
        with collection_paused(), contextlib.ExitStack() as self.warming:
            with self.stages("plan"):
                checkpoint = self._open(model_config)
                if versions.quantizes_cache(vllm_config):
                    checkpoint = with_scales_of_caches(checkpoint)
            self.options, remark = options.settled(checkpoint)
            self.quant_config = self._quant_config(vllm_config, model_config, checkpoint)
            self.device = self._device(vllm_config)
            self._warm_up(checkpoint)
            for said in filter(None, (remark, unused_scales(checkpoint))):
                log.info("octavo: %s", printable(said))
            return self._load_model(vllm_config, model_config, prefix, checkpoint)

    def _load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str, checkpoint: Checkpoint
    ) -> nn.Module:
        with self.stages("plan"):
            if self.is_draft:
                self.options = drafts.fitting(self.options, checkpoint)
            depends = functools.partial(versions.facts_of, vllm_config, model_config, prefix)
            about = (self.options, self.options.layout, self.device, log, self.stages)
            self.loading = Loading("vLLM", checkpoint, *about, depends)
            self.quant_config.layers = self.loading.patterns
        self._read_ahead()

        def make(kept: Mapping[str, str]) -> nn.Module:
            self.quant_config.fill(self.loading.config, kept)
            with self.quant_config.used():
                made: nn.Module = super(OctavoLoader, self).load_model(vllm_config, model_config, prefix)
            return made

        return self.loading.model(make, versions.remember_layers(vllm_config))

    def _warm_up(self, checkpoint: Checkpoint) -> None:
        """Pinned memory and kernels, while the model is planned and made."""
        options = self.options
        warm = WarmUp(self.device, options.staging_bytes, options.threads, [options.scheme])
        self.warming.enter_context(warm).decode(info.coding for info in checkpoint.tensors.values())

    def _read_ahead(self) -> None:
        """What the page cache lacks, while the model is made."""
        rank, ranks = place_among_ranks()
        self.warming.enter_context(ReadAhead(self.loading.checkpoint.shards, rank / ranks))

    def _quant_config(self, vllm_config: VllmConfig, model_config: ModelConfig, checkpoint: Checkpoint) -> OctavoConfig:
        """The config that vLLM made from ``--quantization``, or one made now, as vLLM would."""
        if getattr(model_config, "quantization_config", None) is not None:
            raise RecipeError(
                "--quantization-config is for vLLM's own online quantization, which has nothing to do where octavo "
                "quantizes; leave it out"
            )
        found = vllm_config.quant_config
        if isinstance(found, OctavoConfig):
            return found
        if found is not None and not self._decodes(model_config, checkpoint):
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

    @staticmethod
    def _decodes(model_config: ModelConfig, checkpoint: Checkpoint) -> bool:
        """Return True if a checkpoint that is quantized already can be read as what it stands for; vLLM forgets then
        that it is."""
        if scheme_of_quantization(model_config.quantization) or checkpoint.source is None:
            return False
        for config in (model_config.hf_config, model_config.hf_text_config):
            for key in QUANTIZATION_KEYS:
                if hasattr(config, key):
                    delattr(config, key)
        return True

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
            return Checkpoint.open(local).decoded()
        files = versions.files_of(self, DefaultModelLoader.Source(model_config.model, model_config.revision))
        return Checkpoint.open_chosen(files).decoded()

    # -- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Survey, then read and fill."""
        with self.stages("plan"):
            found = self.survey(model, model_config)
        self.loading.tell(found)
        self.warming.close()
        self.loading.fill(found, model.load_weights, self._progress())
        about = (found.plan, self.options.layout, found.fillers, self.quant_config.paths(model))
        reload.prepare(model, self.loading.checkpoint, *about)

    def survey(self, model: Any, model_config: ModelConfig) -> Survey:
        """What the model's loader does with the checkpoint. Refuse what can't be done; have the model made anew."""
        if tuple(getattr(model, "secondary_weights", ())):
            raise RecipeError(
                f"{model_config.model}: {type(model).__name__} reads several checkpoints, which octavo does not; leave "
                "--load-format and --quantization out"
            )
        if self.vllm_config.parallel_config.pipeline_parallel_size == 1:  # else a layer may be another rank's
            self.loading.check_patterns(model, self.quant_config)
        replaced = functools.partial(drafts.replaced, self.vllm_config, model, model_config)
        with versions.unheard():
            return self.loading.survey(model, self.quant_config, exempt=versions.exempt(model), replaced=replaced)

    def _progress(self) -> bool | None:
        if not self.load_config.use_tqdm_on_load:
            return False
        return None if place_among_ranks()[0] == 0 else False

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """For reloading: the weights of a checkpoint, unquantized, as vLLM expects them."""
        return CheckpointWeights(with_scales_of_caches(self._open(model_config)), model, self.options)


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
