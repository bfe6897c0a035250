"""octavo as a quantizer of transformers: ``from_pretrained(path, quantization_config=OctavoConfig("fp8_channel"))``.

A bf16 checkpoint is planned and streamed into the model in the hook that transformers calls before it loads weights.
Its own loading then meets converters that hand out what is already there, and reads nothing itself.

Of a checkpoint that ``save_pretrained`` wrote, only the modules are swapped; transformers loads FP8 numbers and scales
like any other parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint.checkpoint import Checkpoint
from ...choices import AUTO, DEFAULT_STAGING_BYTES
from ...errors import CheckpointError, RecipeError, boundary
from ...machine import usable_device
from ...planning.plan import Plan
from ...planning.recipe import Recipe
from ...running import modules
from ...streaming.meter import Stages
from ...text import shown, told
from .devices import Sizes, is_automatic, placed, spread
from .model_plan import conversions_of
from .remembered import REMEMBERED, plan_once
from .saved import check_files, names_in
from .skeleton import compute_buffers
from .swap import METHOD, fill, swap, swap_planned


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):
    """The ``quantization_config`` that makes ``from_pretrained`` load as `octavo.load` does.

    Args:
        scheme: The scheme of every weight that no target names: ``"fp8_channel"``, ``"fp8_block"``, ``"fp8_tensor"``,
            ``"mxfp8"``, ``"int8_channel"`` or ``"nvfp4"``; or ``"auto"``, as for `octavo.Recipe`. None quantizes
            targets only.
        targets: Patterns and their schemes, as in `octavo.Recipe`.
        ignore: Patterns of weights that stay as they are: names, globs or ``re:regex``.
        staging_bytes: A bound in bytes on memory beyond the model. 256 MiB by default, at least 1 MiB.
        threads: The number of threads that read. By default one a core, at most 16.
        weights: Of a checkpoint in FP8, each weight's ``[scheme, parts]``; ``save_pretrained`` writes it.

    Raises:
        RecipeError: An unknown scheme, a malformed pattern, or an option that is none of these.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> config = octavo.OctavoConfig("fp8_channel", ignore=["*.self_attn.*"])
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", quantization_config=config)
        >>> print(model.load_report)
    """

    def __init__(
        self,
        /,  # what a file holds may have a key of this name, too
        scheme: str | None = AUTO,
        targets: Mapping[str, str] | None = None,
        ignore: tuple[str, ...] | list[str] = (),
        staging_bytes: int = DEFAULT_STAGING_BYTES,
        threads: int | None = None,
        weights: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise RecipeError(f"OctavoConfig: unknown option {sorted(unknown)[0]!r}")
        self.quant_method = METHOD  # type: ignore[assignment]
        recipe = Recipe(scheme, targets or {}, ignore)
        self.scheme, self.targets, self.ignore = recipe.scheme, dict(recipe.targets), list(recipe.ignore)
        self.staging_bytes, self.threads = staging_bytes, threads
        self.decodes = False  # whether it is given for a checkpoint that another method has quantized
        if not isinstance(weights, Mapping | None):
            raise RecipeError(f"OctavoConfig: weights must map names to [scheme, parts], not be {shown(weights)}")
        self.weights = None if weights is None else dict(weights)

    def to_dict(self) -> dict[str, Any]:
        """The form that is saved: what was done to the weights, and not how this machine loaded them."""
        saved: dict[str, Any] = super().to_dict()
        return {key: value for key, value in saved.items() if key not in ("staging_bytes", "threads", "decodes")}

    @property
    def recipe(self) -> Recipe:
        """Scheme, targets and ignore."""
        return Recipe(self.scheme, self.targets, self.ignore)

    def swap(self, model: Any) -> None:
        """Give the modules of a model that was saved in FP8 the form that its ``weights`` list.

        Raises:
            CheckpointError: the model has no such weights, or none are listed.
        """
        try:
            if self.weights is None:
                raise KeyError("weights")
            names = names_in(model, self.weights)
            swap(model, [(names[n], scheme, tuple(parts)) for n, (scheme, parts) in self.weights.items() if n in names])
        except KeyError as error:
            lacks = "lists no weights" if self.weights is None else f"lists {error.args[0]}, which the model lacks"
            raise CheckpointError(
                f"{model.config.name_or_path}/config.json: quantization_config does not fit the model: it {lacks}. Was "
                "config.json edited, to fewer layers say?"
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{model.config.name_or_path}/config.json: quantization_config does not fit the model: {told(error)}"
            ) from error

    def record(self, model: Any) -> None:
        """List the weights of a model that are quantized: once it is saved, `swap` needs to know them."""
        self.weights = {name: [scheme, list(parts)] for name, scheme, parts in modules.quantized_weights(model)}


def _merge(
    cls: type[AutoHfQuantizer],
    quantization_config: Any,
    quantization_config_from_args: Any,
) -> Any:
    """What a checkpoint declares, and what is asked for, in one config: octavo's where a user gives it."""
    declared = quantization_config
    method = declared.get("quant_method") if isinstance(declared, Mapping) else getattr(declared, "quant_method", None)
    asked = quantization_config_from_args
    if isinstance(asked, OctavoConfig):
        if method != METHOD:
            asked.decodes = True
            return asked
        saved = declared if isinstance(declared, OctavoConfig) else OctavoConfig(**declared)
        _check_recipe(saved, asked.recipe, "the checkpoint")
    return _merge_of_transformers(cls, quantization_config, quantization_config_from_args)


_merge_of_transformers = AutoHfQuantizer.merge_quantization_configs.__func__  # type: ignore[attr-defined]
AutoHfQuantizer.merge_quantization_configs = classmethod(_merge)  # type: ignore[assignment]


class _StreamedConverter(WeightConverter):
    """Stands in for a converter whose parameters are in the model already.

    The first one that transformers asks hands out all of them, the others nothing. The tensors that transformers has
    collected for converting are not read yet, and never will be.
    """

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, torch.Tensor]:
        self.collected_tensors.clear()
        handed = {name: model.get_parameter_or_buffer(name) for name in hf_quantizer.streamed}
        hf_quantizer.streamed.clear()
        return handed


class _Unwrapped(WeightRenaming):
    """Gives transformers the names that octavo has for tensors which a wrapper's name is part of."""

    __slots__ = ("names",)
    names: Mapping[str, str]

    @classmethod
    def of(cls, names: Mapping[str, str]) -> _Unwrapped:
        made = cls("^$", "")
        made.names = names
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.names.get(source_key, source_key), None


@dataclass(frozen=True)
class _Waiting:
    """A model that is streamed as soon as it is known to which devices."""

    model: Any
    checkpoint: Checkpoint
    plan: Plan
    stages: Stages
    sizes: Sizes


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):
    """The quantizer that transformers asks, and calls before and after it loads weights."""

    requires_calibration = False
    is_trainable = False

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config: OctavoConfig = quantization_config
        if quantization_config.decodes:  # what is quantized is streamed as if it were not
            self.pre_quantized = False
        self.renamed: Mapping[str, str] = {}  # `Checkpoint.renamed`
        self.streamed: set[str] = set()  # parameters and scales that the stream has filled, until they are handed out
        self._notes: tuple[str, ...] = ()  # for the report
        self._sources: tuple[str, ...] = ()  # names of the tensors that are streamed
        self._waiting: _Waiting | None = None  # for transformers to decide about devices

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Let ``save_pretrained`` write these models."""
        return True

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes that each element of a parameter will take: none if the stream has filled it.

        transformers reserves device memory by these, after streaming; and chooses devices for ``device_map="auto"``
        before it.
        """
        if param_name in self.streamed:
            return 0
        if self._waiting is not None:
            return self._waiting.sizes.param_element_size(model, param_name, param)
        return super().param_element_size(model, param_name, param)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room for staging."""
        return max_memory if self._waiting is None else self._waiting.sizes.adjust_max_memory(max_memory)

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Stream, once transformers has chosen the devices; it shows here what it chose."""
        if (waiting := self._waiting) is not None:
            self._waiting = None
            places = placed(device_map)
            self._stream(waiting.model, waiting.checkpoint, waiting.stages, spread(waiting.plan, waiting.model, places))

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        """Stream a bf16 checkpoint into the model, or prepare it for one that is FP8."""
        if self.pre_quantized:
            self.config.swap(model)
            if checkpoint_files:
                check_files(model, Checkpoint.open_chosen([Path(file) for file in checkpoint_files]))
            return
        config = self.config
        if getattr(model.config, "distributed_config", None) is not None:
            raise RecipeError("OctavoConfig with tensor parallel loading is not supported: serve with vLLM instead")
        if not checkpoint_files:
            raise RecipeError("OctavoConfig needs a checkpoint on disk to stream from")
        stages = Stages()
        with stages("plan"):
            checkpoint = Checkpoint.open_chosen([Path(file) for file in checkpoint_files]).decoded()
            self.renamed, self._sources = checkpoint.renamed, tuple(checkpoint.tensors)
            staging_bytes = config.staging_bytes
            plan, remembered = plan_once(
                model, checkpoint, config.recipe, "cpu", staging_bytes, strict=False, heads=True
            )
            self._notes = (REMEMBERED,) if remembered else ()
            config.scheme = plan.recipe.scheme
        with stages("swap"):
            swap_planned(model, plan)
        if is_automatic(device_map):
            self._waiting = _Waiting(model, checkpoint, plan, stages, Sizes(plan))
            return
        places = placed("cpu" if device_map is None else device_map)
        for device in set(places.values()):
            usable_device(device, begin=False)
        self._stream(model, checkpoint, stages, spread(plan, model, places))

    def _stream(self, model: Any, checkpoint: Checkpoint, stages: Stages, plan: Plan) -> None:
        with boundary(checkpoint.path, CheckpointError):
            fill(model, checkpoint, plan, stages, threads=self.config.threads, notes=self._notes)
        self.streamed = {p.name for p in plan.placements} | {modules.scale_name(p.name) for p in plan.quantized}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Put a stand-in in the place of each converter, and one at the end for tensors that no converter takes."""
        if self.pre_quantized:
            return weight_conversions
        self._refuse_key_mapping(weight_conversions, model)
        stand_ins = []
        for entry in weight_conversions:
            if isinstance(entry, WeightConverter):
                sources, targets = entry._original_source_patterns, entry._original_target_patterns
                stand_in = _StreamedConverter(list(sources), list(targets)[:1], [Chunk()])  # which is not run
                stand_in.scope_prefix, stand_in.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
                stand_ins.append(stand_in)
            else:  # a renaming
                stand_ins.append(entry)
        unwrapped = [_Unwrapped.of(self.renamed)] if self.renamed else []
        return [*unwrapped, *stand_ins, _StreamedConverter([r"^(.+)$"], [r"\1"], [Chunk()])]

    def _refuse_key_mapping(self, weight_conversions: list[Any], model: Any) -> None:
        """Raise where ``key_mapping`` renames a tensor, which transformers tells only when all have been streamed.

        Its entries stand before those that the model has of itself.
        """
        asked = weight_conversions[: len(weight_conversions) - len(conversions_of(model))]
        for entry, name in itertools.product(asked, self._sources):
            if (renamed := entry.rename_source_key(name)[0]) != name:
                raise RecipeError(
                    f"OctavoConfig does not take key_mapping, by which {name} would be {renamed}: names are those of "
                    "the files, and the model's own mapping. Rename the tensors in the files"
                )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Set right what transformers has computed of FP8 layers, and finish."""
        _compute_tables(model)
        return self.finish(model)

    def finish(self, model: Any) -> Any:
        """Freeze what is FP8, and have ``save_pretrained`` write it under the model's own names."""
        model._weight_conversions = []
        self.config.record(model)
        parameters = dict(model.named_parameters())
        for weight, _scheme, _parts in modules.quantized_weights(model):
            for name in (weight, modules.scale_name(weight)):
                parameters[name].requires_grad_(False)
        modules.serve(model)
        model.config.quantization_config = self.config  # which transformers does itself, in ``from_pretrained``
        return model


def saved_config(checkpoint: Checkpoint, asked: Recipe) -> OctavoConfig | None:
    """The config of a model that octavo quantized and ``save_pretrained`` wrote; None for a bf16 checkpoint.

    Raises:
        CheckpointError: the config is none that octavo writes.
        RecipeError: the model was quantized by another recipe than the one asked for.
    """
    if checkpoint.quantization is None:
        return None
    try:
        config = OctavoConfig(**checkpoint.config["quantization_config"])
    except RecipeError as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json: quantization_config: {error}") from error
    _check_recipe(config, asked, str(checkpoint.path))
    return config


def _check_recipe(saved: OctavoConfig, asked: Recipe, where: str) -> None:
    """Raise if a model that was saved quantized is asked for by another recipe, and not by none."""
    if asked not in (saved.recipe, Recipe(), Recipe(None)):
        raise RecipeError(
            f"{where}: saved quantized by another recipe ({saved.recipe}); it can't be quantized again. Name no scheme "
            "to load it as it is."
        )


def mark_quantized(model: Any, recipe: Recipe) -> None:
    """Leave a model that octavo loaded as ``from_pretrained`` would, so that ``save_pretrained`` works."""
    quantizer = OctavoQuantizer(OctavoConfig(recipe.scheme, dict(recipe.targets), recipe.ignore), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    quantizer.finish(model)


def _compute_tables(model: Any) -> None:
    """Compute tables anew of modules that may have asked the layers within them for a dtype: not FP8 is meant.

    In `octavo.load`, tables are computed before there is any.
    """
    quantized = {name: model.get_submodule(name.rpartition(".")[0]) for name, *_ in modules.quantized_weights(model)}
    paths = {prefix for name in quantized for prefix in itertools.accumulate(name.split(".")[:-2], "{}.{}".format)}
    above = [m for path, m in model.named_modules() if path in paths and m._non_persistent_buffers_set]
    own = not type(model).__module__.startswith("transformers.")
    if not above or own:  # whose code may give weights, too, new values
        return
    linears = [module for module in quantized.values() if isinstance(module, modules.QuantizedLinear)]
    weights = {module: module._parameters["weight"] for module in linears}
    for module in linears:
        like = torch.empty(module.out_features, module.in_features, dtype=module.activation_dtype, device="meta")
        module._parameters["weight"] = nn.Parameter(like, requires_grad=False)
    try:
        compute_buffers(model, above)
    finally:
        for module, weight in weights.items():
            module._parameters["weight"] = weight
