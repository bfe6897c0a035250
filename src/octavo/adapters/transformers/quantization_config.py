"""What ``quantization_config`` says, to ``from_pretrained`` and in the config.json of a saved FP8 model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint.checkpoint import Checkpoint
from ...errors import RecipeError
from ...planning.plan import DEFAULT_STAGING_BYTES
from ...planning.recipe import DEFAULT_SCHEME, Recipe
from ...running.modules import quantized_weights
from .swap import METHOD, swap


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):
    """What ``quantization_config`` takes.

    Args:
        scheme: as in `octavo.Recipe`.
        targets: as in `octavo.Recipe`.
        ignore: as in `octavo.Recipe`.
        staging_bytes: as in `octavo.load`.
        threads: as in `octavo.load`.
        weights: name -> [scheme, parts] of a checkpoint that is quantized already; written by ``save_pretrained``.
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
        """Give the modules of a saved model the FP8 form that ``weights`` tells of."""
        if self.weights is None:
            raise KeyError("weights")
        swap(model, [(name, scheme, tuple(parts)) for name, (scheme, parts) in self.weights.items()])

    def record(self, model: Any) -> None:
        """Take down which weights of a model are quantized, and how: what `swap` needs when it has been saved."""
        self.weights = {name: [scheme, list(parts)] for name, scheme, parts in quantized_weights(model)}


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
