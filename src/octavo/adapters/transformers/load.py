"""`octavo.load`: a transformers model, as FP8, while its checkpoint streams.

    open        the headers and the config are read
    import      transformers' code; from here on, files that are not cached are read ahead
    skeleton    the model is built, its parameters on meta, its buffers real
    plan        where does every element of the checkpoint go, and what becomes of every parameter?
    swap        the modules that the plan quantizes take their FP8 form; a map of devices is made of their sizes
    allocate    parameters get their memory
    stream      and are filled, chunk by chunk
    finish      buffers go to the device, tied weights are tied

These are the stages whose seconds the report counts. Importing transformers takes seconds, so nothing of it is imported
here before its stage.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...choices import DEFAULT_STAGING_BYTES
from ...errors import MissingExtraError, RecipeError
from ...planning.plan import Plan
from ...planning.recipe import Recipe
from ...running.ahead import Ahead
from ...streaming.checks import Checks
from ...streaming.meter import Stages
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from .devices import candidates, decide, dispatch, is_automatic, placed, placer, spread
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
    verify: bool,
    progress: bool | Callable[[int, int], None] | None,
) -> Any:
    """Do what `octavo.load` promises; arguments and errors are documented there."""
    stages = Stages()
    target, *others = candidates(device, asked)
    ahead = Ahead((target, *others) if recipe.schemes else ())
    with WarmUp(target, staging_bytes, threads, recipe.schemes, others) as warm:
        with stages("open"):
            _require_installed()  # before anything is fetched
            checkpoint = Checkpoint.open(path, revision).decoded()
            _check_method(checkpoint)
            warm.decode(info.coding for info in checkpoint.tensors.values())
            checks = Checks(checkpoint) if verify else None
        with contextlib.nullcontext() if direct_io else ReadAhead(checkpoint.shards):
            prepared = prepare(checkpoint, recipe, str(target), staging_bytes, asked, stages=stages, strict=strict)
    model, plan, places = prepared.model, prepared.plan, prepared.places

    def finish() -> None:
        with stages("finish"):
            _move_buffers(model, placer(places, model))
            _tie(model, plan)
            dispatch(model, places)

    how: dict[str, Any] = {"threads": threads, "direct_io": direct_io, "checks": checks, "ahead": ahead}
    how["notes"] = prepared.notes
    fill(model, checkpoint, plan, stages, progress=progress, finish=finish, **how)
    if prepared.saved:
        model.load_routes = None  # the names in its checkpoint are the model's own
    if prepared.saved or plan.quantized:
        from .quantizer import mark_quantized

        mark_quantized(model, prepared.saved or plan.recipe)
    return model


@dataclass(frozen=True)
class Prepared:
    """All that is known before a weight is read."""

    model: Any  # its parameters are on meta
    plan: Plan
    saved: Recipe | None  # the recipe of a model that ``save_pretrained`` wrote in FP8; None for any other checkpoint
    places: Mapping[str, str]  # module -> device
    notes: tuple[str, ...]  # for the report, beside those of the plan


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
    """Import, build the skeleton, plan, swap: all that comes between opening a checkpoint and reading weights.

    Arguments and errors are those of `octavo.load`.
    """
    stages = stages or Stages()
    with stages("import"):
        require()
        from .quantizer import saved_config
        from .remembered import REMEMBERED, plan_once
        from .saved import check_files
        from .skeleton import skeleton
        from .swap import swap_planned

        _check_method(checkpoint)
        saved = saved_config(checkpoint, recipe)
    with stages("skeleton"):
        model = skeleton(checkpoint, asked)
    with stages("plan"):
        if saved:
            saved.swap(model)
            check_files(model, checkpoint)
        # what was saved in FP8 is loaded as it is
        asked_for = Recipe(None) if saved else recipe
        plan, remembered = plan_once(model, checkpoint, asked_for, device, staging_bytes, strict=strict)
    with stages("swap"):
        swap_planned(model, plan)
        places = {"": device}
        if asked.device_map is not None:
            automatic = is_automatic(asked.device_map)
            places = decide(model, plan, asked.device_map, asked.max_memory) if automatic else placed(asked.device_map)
            plan = spread(plan, model, places)
    notes = (REMEMBERED,) if remembered else ()
    return Prepared(model, plan, saved.recipe if saved else None, places, notes)


def require() -> None:
    """Import what a load needs of transformers.

    Raises:
        MissingExtraError: transformers or accelerate is not installed, or too old.
    """
    try:
        from . import model_plan, skeleton  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("transformers", "loading a transformers model") from error


def _require_installed() -> None:
    """Find out the same, as far as it can be told without importing anything, which takes seconds."""
    if not all(find_spec(name) for name in ("transformers", "accelerate")):
        raise MissingExtraError("transformers", "loading a transformers model")


def _check_method(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that another method than octavo's has quantized."""
    found = checkpoint.quantization
    if found is not None and found.method != METHOD:
        raise RecipeError(
            f"{checkpoint.path}: already quantized ({found}){found.why}. octavo.load "
            "takes bf16 checkpoints, and what save_pretrained made of a model that octavo loaded. Load this one with "
            f"from_pretrained, or serve it. {found.advice}"
        )


def _move_buffers(model: Any, place: Callable[[str], str]) -> None:
    """Bring to their devices what no checkpoint holds: rotary tables, positions and the like."""
    if left := [
        module for module in model.modules() if any(b is not None and b.is_meta for b in module.buffers(False))
    ]:
        from .skeleton import compute_buffers

        compute_buffers(model, left)  # they ask their weights where to be
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(place(prefix + leaf))
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            if parameter.device != (device := torch.device(place(prefix + leaf))):
                module._parameters[leaf] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)


def _tie(model: Any, plan: Plan) -> None:
    """Tie weights as ``from_pretrained`` does.

    Of two tied weights, the one that the checkpoint lacks becomes the other. If it has both, and they differ, they stay
    two.
    """
    tied = model.all_tied_weights_keys
    missing = {*tied.keys(), *tied.values()} - {placement.name for placement in plan.placements}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"planned, but not filled: {left[:5]}"
