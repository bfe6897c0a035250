"""``--load-format octavo``: a model of SGLang, filled with FP8 from a checkpoint in bf16, or from what one stands for.

All but the model is `octavo.adapters.engine.loading`'s, for every engine.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...errors import RecipeError
from ...streaming.meter import Stages, collection_paused
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from ...text import printable
from ..engine.given import SCALE_PASSED_OVER
from ..engine.left import Calls
from ..engine.loading import Loading, MakeAnewError, place_among_ranks
from ..engine.names import LOAD_FORMAT
from ..engine.survey import Survey
from ..engine.telling import Telling
from . import asking, plugin, reloading, runner, versions
from .computed import Computed
from .config import Layers, deciding
from .options import Options

telling = Telling(plugin.log)


class OctavoLoader(runner.Reloads, DefaultModelLoader):  # type: ignore[misc]
    """Errors are `OctavoError`, raised before a weight is read, and leave no model behind."""

    @telling
    def __init__(self, load_config: Any) -> None:
        plugin.check_hooks()
        self.extra = load_config.model_loader_extra_config
        # SGLang keeps this config, and by it reads adapters of LoRA, too
        load_config.load_format, load_config.model_loader_extra_config = LoadFormat.AUTO, {}
        super().__init__(load_config)
        self.options = Options.of(self.extra)
        self.stages = Stages()

    @telling
    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """Make the model and fill it. Errors: see `Options.parse`, `Checkpoint.open`, `Surveyor.run`."""
        scheme = asking.scheme_of(model_config)
        if scheme is None and versions.is_draft(model_config):
            stock = get_model_loader(self.load_config, model_config)
            unquantized: nn.Module = stock.load_model(model_config=model_config, device_config=device_config)
            return unquantized
        if scheme is None:
            raise RecipeError(
                f"--load-format {LOAD_FORMAT}: SGLang's config of {model_config.model_path} is not octavo's, so "
                "nothing would become FP8; make models by `ModelConfig.from_server_args`, as SGLang's servers do"
            )
        options = self._options(model_config, scheme)
        if said := versions.untried():
            plugin.log.warning("%s", said)
        target = torch.device(device_config.device)
        # with the number of the current one: each thread has its own
        device = torch.empty(0, device=target).device
        with collection_paused(), contextlib.ExitStack() as self.warming:
            with self.stages("plan"):
                checkpoint = self._open(model_config)
            self.options, remark = options.settled(checkpoint)
            warm = WarmUp(device, self.options.staging_bytes, self.options.threads, [self.options.scheme])
            self.warming.enter_context(warm).decode(info.coding for info in checkpoint.tensors.values())
            if remark:
                plugin.log.info("octavo: %s", printable(remark))
            return self._load_model(model_config, target, device, checkpoint)

    def _options(self, model_config: Any, scheme: str) -> Options:
        """Those of a target, or of a draft."""
        if versions.is_draft(model_config) and (options := self.options.for_draft()) and options.scheme == scheme:
            return options
        return self.options

    def _load_model(
        self, model_config: Any, target: torch.device, device: torch.device, checkpoint: Checkpoint
    ) -> nn.Module:
        layout = self.options.layout
        with self.stages("plan"):
            depends = functools.partial(versions.facts_of, model_config, self.load_config)
            about = (self.options, layout, device, plugin.log, self.stages)
            self.loading = Loading("SGLang", checkpoint, *about, depends)
        rank, ranks = place_among_ranks()
        self.warming.enter_context(ReadAhead(checkpoint.shards, rank / ranks))

        def make(kept: Mapping[str, str]) -> nn.Module:
            with self.stages("plan"):  # which is made where it is asked for
                told, plan = self.loading.config, self.loading.plan_to_make_by
            model_config.hf_config.quantization_config = asking.marked(told, self.options)
            layers = Layers(self.options.scheme, plan, self.loading.patterns, kept)
            config = deciding(versions.quantization_config(model_config, self.load_config), layers)
            with versions.default_dtype(model_config.dtype):
                with target:
                    model = versions.make(model_config, self.load_config, config)
                self._fill(model, model_config, layers)
                versions.process(model, target)
            return model.eval()

        return self.loading.model(make, lambda: None)

    def _open(self, model_config: Any) -> Checkpoint:
        local = Path(model_config.model_path)
        if local.is_dir():
            return Checkpoint.open(local).decoded()
        return Checkpoint.open_chosen(versions.files_of(self, model_config)).decoded()

    def _fill(self, model: Any, model_config: Any, layers: Layers) -> None:
        """Survey, then read and fill."""
        computed = Computed(model)
        with self.stages("plan"), computed.noted():
            found = self._survey(model, model_config, layers, computed.since)
        self.loading.tell(found)
        self.warming.close()
        with computed.noted():
            self.loading.fill(found, model.load_weights, None if place_among_ranks()[0] == 0 else False)
        computed.compute()
        reloading.prepare(model, self.loading, found, self.options, layers.paths(model))

    def _survey(self, model: Any, model_config: Any, layers: Layers, calls: Calls) -> Survey:
        """What the model's loader does with the checkpoint. Refuse what can't be done; have the model made anew."""
        if tuple(getattr(model, "secondary_weights", ())):
            raise RecipeError(
                f"{model_config.model_path}: {type(model).__name__} reads several checkpoints, which octavo does not; "
                "leave --load-format and --quantization out"
            )
        if versions.is_whole(model):
            self.loading.check_patterns(model, layers)
        try:
            replaced = functools.partial(versions.replaced, model, model_config)
            return self.loading.survey(model, layers, versions.exempt(model), replaced, layers.planned, calls)
        except MakeAnewError as again:
            if self.options.format == "fp8" and any(SCALE_PASSED_OVER in why for why in again.keep.values()):
                raise RecipeError(
                    f"{type(model).__name__} in SGLang has no place for the scales of the format 'fp8' "
                    "(weight_scale_inv), and would serve without them; use the format 'compressed-tensors'"
                ) from None
            raise
