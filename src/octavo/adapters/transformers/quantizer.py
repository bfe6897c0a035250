"""octavo as a quantizer of transformers: ``from_pretrained(path, quantization_config=OctavoConfig("fp8_channel"))``.

On a bf16 checkpoint, the model is planned, swapped and streamed in the hook that runs before weights are loaded;
transformers' own loading then finds converters that hand out what is already there, and reads nothing itself. On a
checkpoint that ``save_pretrained`` wrote, modules are swapped and transformers loads FP8 and scales as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import Chunk, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint.checkpoint import Checkpoint
from ...choices import DEFAULT_SCHEME, DEFAULT_STAGING_BYTES
from ...errors import CheckpointError, DeviceError, RecipeError
from ...machine import usable_device
from ...planning.recipe import Recipe
from ...running import modules
from ...streaming.meter import Stages
from .model_plan import plan_model
from .swap import METHOD, fill, swap


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):
    """The ``quantization_config`` that makes ``from_pretrained`` load as `octavo.load` does.

    Args:
        scheme: The scheme of every weight that no target names: ``"fp8_channel"``, ``"fp8_block"``, ``"fp8_tensor"`` or
            ``"mxfp8"``. None quantizes targets only.
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
        scheme: str | None = DEFAULT_SCHEME,
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
        self.weights = None if weights is None else dict(weights)

    def to_dict(self) -> dict[str, Any]:
        """What is saved: not how this machine loaded it."""
        saved: dict[str, Any] = super().to_dict()
        return {key: value for key, value in saved.items() if key not in ("staging_bytes", "threads")}

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.scheme, self.targets, self.ignore)

    def swap(self, model: Any) -> None:
        """Give the modules of a saved model the FP8 form that ``weights`` tells of.

        Raises:
            CheckpointError: the model has no such weights, or none are listed.
        """
        try:
            if self.weights is None:
                raise KeyError("weights")
            swap(model, [(name, scheme, tuple(parts)) for name, (scheme, parts) in self.weights.items()])
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{model.config.name_or_path}/config.json: quantization_config does not fit the model: "
                f"{type(error).__name__}: {error}"
            ) from error

    def record(self, model: Any) -> None:
        """Take down which weights of a model are quantized, and how: what `swap` needs when it has been saved."""
        self.weights = {name: [scheme, list(parts)] for name, scheme, parts in modules.quantized_weights(model)}


class _StreamedConverter(WeightConverter):
    """Hands out all that the stream has filled, when it is first asked to convert anything; later, nothing.

    The readers that it collected are dropped unread.
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


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):
    """Streams a bf16 checkpoint into FP8, or swaps modules for one that is FP8 already."""

    requires_calibration = False
    is_trainable = False

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config: OctavoConfig = quantization_config
        self.streamed: set[str] = set()  # parameters and scales that are in memory before transformers loads any

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes that each element of a parameter still takes: none where the stream has filled it.

        transformers multiplies these to reserve device memory and to choose devices for ``device_map="auto"``; both
        come after streaming, when free memory is already less the model.
        """
        return 0 if param_name in self.streamed else super().param_element_size(model, param_name, param)

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        if self.pre_quantized:
            self.config.swap(model)
            return
        config = self.config
        if getattr(model.config, "distributed_config", None) is not None:
            raise RecipeError("OctavoConfig with tensor parallel loading is not supported: serve with vLLM instead")
        if not checkpoint_files:
            raise RecipeError("OctavoConfig needs a checkpoint on disk to stream from")
        stages = Stages()
        with stages("plan"):
            checkpoint = Checkpoint.open_files([Path(file) for file in checkpoint_files])
            where = _placer(device_map)
            plan = plan_model(model, checkpoint, config.recipe, where, config.staging_bytes, strict=False)
        fill(model, checkpoint, plan, stages, threads=config.threads)
        self.streamed = {p.name for p in plan.placements} | {modules.scale_name(p.name) for p in plan.quantized}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if self.pre_quantized:
            return weight_conversions
        streamed = []
        for entry in weight_conversions:
            if isinstance(entry, WeightConverter):
                twin = _StreamedConverter(
                    list(entry._original_source_patterns), list(entry._original_target_patterns)[:1], [Chunk()]
                )
                twin.scope_prefix, twin.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
                streamed.append(twin)
            else:
                streamed.append(entry)
        return [*streamed, _StreamedConverter([r"^(.+)$"], [r"\1"], [Chunk()])]

    def _process_model_after_weight_loading(self, model: Any, **__: Any) -> Any:
        model._weight_conversions = []  # saved under the model's own names
        self.config.record(model)
        for name, *_ in modules.quantized_weights(model):
            for parameter in (name, modules.scale_name(name)):
                model.get_parameter(parameter).requires_grad_(False)
        model.config.quantization_config = self.config  # which transformers does itself, in ``from_pretrained``
        return model


def saved_config(checkpoint: Checkpoint, asked: Recipe) -> OctavoConfig | None:
    """The config that ``save_pretrained`` wrote of a model that octavo quantized; None for a bf16 checkpoint.

    Raises:
        RecipeError: the model was quantized by another recipe than the one asked for.
    """
    if checkpoint.quantization is None:
        return None
    config = OctavoConfig(**checkpoint.config["quantization_config"])
    if asked not in (config.recipe, Recipe(), Recipe(None)):
        raise RecipeError(
            f"{checkpoint.path}: saved as FP8 by another recipe ({config.recipe}); it can't be quantized again"
        )
    return config


def mark_quantized(model: Any, recipe: Recipe) -> None:
    """Make a model that octavo quantized known to transformers as such, so that ``save_pretrained`` works."""
    quantizer = OctavoQuantizer(OctavoConfig(recipe.scheme, dict(recipe.targets), recipe.ignore), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    quantizer._process_model_after_weight_loading(model)


def _placer(device_map: Any) -> Any:
    """transformers' ``device_map`` as a function from a parameter's name to its device."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, str):
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            if torch.cuda.device_count() > 1:
                raise DeviceError(
                    f"device_map={device_map!r} with several GPUs is not supported with OctavoConfig: name a device "
                    "('cuda:0') or give a dict of module names to devices"
                )
            return "cuda:0" if torch.cuda.is_available() else "cpu"
        return str(usable_device(device_map, begin=False))
    places = {str(module): _device_name(device) for module, device in dict(device_map).items()}
    if "disk" in places.values():
        raise DeviceError("device_map with 'disk' is not supported with OctavoConfig")

    def place(name: str) -> str:
        path = name
        while path not in places and path:
            path = path.rpartition(".")[0]
        if path not in places:
            raise DeviceError(f"device_map names no device for {name}")
        return places[path]

    return place


def _device_name(device: Any) -> str:
    return (
        f"cuda:{device}" if isinstance(device, int) else os.fspath(device) if isinstance(device, str) else str(device)
    )
