"""transformers models, loaded as FP8 while their checkpoint streams.

    open        headers, the config
    import      transformers' code; files that are not cached are read ahead from here on
    skeleton    the model, parameters on meta, buffers real
    plan        transformers' own conversion mapping, run on symbolic tensors: where every checkpoint element goes
    swap        linear layers and expert stacks that the plan quantizes take their FP8 form
    stream      parameters are allocated, then filled chunk by chunk
    tie         tied weights, generation config

How checkpoint tensors become parameters (stacking experts, fusing gate and up, transposing, renaming) is transformers'
knowledge; none of it is repeated here. `octavo.load` and the quantizer for ``from_pretrained`` (`OctavoConfig`) both go
this way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...checkpoint.checkpoint import Checkpoint
from ...choices import DEFAULT_STAGING_BYTES
from ...errors import MissingExtraError, RecipeError
from ...machine import usable_device
from ...planning.plan import Plan
from ...planning.recipe import Recipe
from ...streaming.meter import Stages
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from .options import DEFAULTS, ModelOptions
from .swap import METHOD, fill


def load_model(
    path: str | os.PathLike[str],
    recipe: Recipe,
    device: str | torch.device,
    asked: ModelOptions,
    *,
    staging_bytes: int,
    threads: int | None,
    strict: bool,
    revision: str | None,
    direct_io: bool | None,
    progress: bool | Callable[[int, int], None] | None,
) -> Any:
    """`octavo.load`, where arguments and errors are documented."""
    stages = Stages()
    target_device = usable_device(device, begin=False)
    with WarmUp(target_device, staging_bytes, threads, recipe.schemes):
        with stages("open"):
            _require_installed()  # before anything is fetched
            checkpoint = Checkpoint.open(path, revision)
            _check_method(checkpoint)
        with contextlib.nullcontext() if direct_io else ReadAhead(checkpoint.shards):
            prepared = prepare(
                checkpoint,
                recipe,
                str(target_device),
                staging_bytes,
                asked,
                stages=stages,
                strict=strict,
            )
    model, plan = prepared.model, prepared.plan

    def finish() -> None:
        with stages("finish"):
            _move_buffers(model, target_device)
            _tie(model, plan)

    fill(model, checkpoint, plan, stages, threads=threads, direct_io=direct_io, progress=progress, finish=finish)
    if prepared.saved:
        model.load_routes = None  # its checkpoint has the model's own names
    if prepared.saved or plan.quantized:
        from .quantizer import mark_quantized

        mark_quantized(model, prepared.saved or recipe)
    return model


@dataclass(frozen=True)
class Prepared:
    """What is known before a weight is read."""

    model: Any  # on meta
    plan: Plan
    saved: Recipe | None  # of a model that octavo quantized and ``save_pretrained`` wrote


def prepare(
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: str = "cpu",
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    asked: ModelOptions = DEFAULTS,
    *,
    stages: Stages | None = None,
    strict: bool = True,
) -> Prepared:
    """Build the skeleton, and plan: all that comes between opening a checkpoint and reading weights.

    Options and errors as for `load`; importing transformers' code is a part of it, and often the longest.
    """
    stages = stages or Stages()
    with stages("import"):
        require()
        from .model_plan import plan_model
        from .quantizer import saved_config
        from .skeleton import skeleton

        _check_method(checkpoint)
        saved = saved_config(checkpoint, recipe)
    with stages("skeleton"):
        model = skeleton(checkpoint, asked)
    with stages("plan"):
        if saved:
            saved.swap(model)
        todo = Recipe(None) if saved else recipe
        plan = plan_model(model, checkpoint, todo, device, staging_bytes, strict=strict)
    return Prepared(model, plan, saved.recipe if saved else None)


def require() -> None:
    """Import what a load needs of transformers; a `MissingExtraError` if that can't be done."""
    try:
        from . import model_plan, skeleton  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "loading a transformers model") from error


def _require_installed() -> None:
    """The same without importing, which takes seconds."""
    if not all(find_spec(name) for name in ("transformers", "accelerate")):
        raise MissingExtraError("transformers", "loading a transformers model")


def _check_method(checkpoint: Checkpoint) -> None:
    """Refuse what another method than octavo's quantized."""
    if checkpoint.quantization not in (None, METHOD):
        raise RecipeError(
            f"{checkpoint.path}: already quantized ({checkpoint.quantization}, says its config.json). octavo.load "
            "takes bf16 checkpoints, and what save_pretrained made of a model that octavo loaded. Load this one with "
            "from_pretrained, or serve it. Start from the bf16 checkpoint to quantize anew."
        )


def _move_buffers(model: Any, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)


def _tie(model: Any, plan: Plan) -> None:
    """As ``from_pretrained`` does: to whichever the checkpoint has, and not where it has two that differ."""
    tied = model.all_tied_weights_keys
    missing = {*tied.keys(), *tied.values()} - {placement.name for placement in plan.placements}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"planned, but not filled: {left[:5]}"
