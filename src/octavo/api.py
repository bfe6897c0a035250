"""The public functions. Each opens a checkpoint, makes a plan, and runs a stream into the sink that it is for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from .checkpoint.checkpoint import Checkpoint
from .conversion import formats
from .conversion.convert import convert
from .conversion.iterate import iterate
from .conversion.verify import verify
from .errors import MissingExtraError
from .machine import usable_device
from .planning.plan import DEFAULT_STAGING_BYTES, Plan
from .planning.recipe import Recipe
from .session import layerwise, update
from .streaming.meter import collection_paused

Scheme = str | Recipe | Mapping[str, Any] | None


@collection_paused()  # importing transformers' model code makes half a million objects, too
def load(path: str | os.PathLike[str], scheme: Scheme = "fp8_channel", device: Any = "cpu", **options: Any) -> Any:
    """Load a transformers model as FP8 while it streams: see `octavo.adapters.transformers.load.load` for all
    options."""
    from .adapters.transformers.load import load

    return load(path, scheme, device, **options)


def plan(
    path: str | os.PathLike[str],
    scheme: Scheme = "fp8_channel",
    device: str = "cpu",
    *,
    ignore: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    model: bool | None = None,
    format: str = formats.DEFAULT,
    revision: str | None = None,
    strict: bool = True,
    dtype: torch.dtype | str | None = None,
    model_class: type[Any] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Plan:
    """What `load` would do (or `convert`, with ``model=False``), from headers and shapes alone.

    Args:
        model: True plans for the transformers model, False for the checkpoint's own tensors; by default, for the model
            where transformers is installed and there is a config.
        format: of the conversion that is planned with ``model=False``.
        strict, dtype, model_class, trust_remote_code, attn_implementation: as for `load`, of a plan for a model.

    Raises:
        OctavoError: whatever `load` would find wrong before reading weights.
    """
    from .adapters.transformers import load as adapter
    from .adapters.transformers.options import ModelOptions

    recipe = Recipe.coerce(scheme, ignore)
    if model is not False:
        try:
            adapter.require()
        except MissingExtraError:
            if model:
                raise
            model = False
    checkpoint = Checkpoint.open(path, revision)
    if model or (model is None and checkpoint.config.get("model_type")):
        options = ModelOptions(dtype, model_class, trust_remote_code, attn_implementation)
        return adapter.prepare(checkpoint, recipe, str(device), staging_bytes, options, strict=strict).plan
    return formats.plan_for(checkpoint, recipe, format, staging_bytes, str(device))[0]


def stream(
    path: str | os.PathLike[str],
    scheme: Scheme = "fp8_channel",
    device: str = "cpu",
    *,
    format: str = formats.DEFAULT,
    ignore: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over ``(name, tensor)`` of the checkpoint in FP8 form, as ``format`` names and lays them out.

    Tensors come in file order, each quantized one followed by its scale; reading runs ahead by at most the staging
    budget. Closing the iterator early ends its threads. Each tensor belongs to the caller.

    Args:
        format: ``compressed-tensors`` or ``fp8``; see `octavo.conversion.formats`.
        progress: called with bytes handed out and bytes in all.

    Raises:
        OctavoError: before the first tensor, whatever headers can tell; later, what only reading shows.
    """
    recipe = Recipe.coerce(scheme, ignore)
    device = str(usable_device(device))
    checkpoint = Checkpoint.open(path, revision)
    made, layout = formats.plan_for(checkpoint, recipe, format, staging_bytes, device)
    return iterate(checkpoint, made, layout, threads=threads, progress=progress)


__all__ = ["convert", "layerwise", "load", "plan", "stream", "update", "verify"]
