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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...checkpoint.checkpoint import Checkpoint
from ...errors import CheckpointError, MissingExtraError, RecipeError
from ...machine import usable_device
from ...planning.plan import DEFAULT_STAGING_BYTES, Plan
from ...planning.recipe import Recipe
from ...streaming.meter import Stages
from ...streaming.on_accelerator import WarmUp
from ...streaming.readahead import ReadAhead
from .options import DEFAULTS, ModelOptions
from .swap import METHOD, fill


def load(
    path: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = "fp8_channel",
    device: str | torch.device = "cpu",
    *,
    ignore: Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    strict: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    direct_io: bool | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Any:
    """Load a transformers model as FP8 while its checkpoint streams.

    The result is an ordinary transformers model (``generate``, ``save_pretrained``, pipelines), in eval mode, whose
    linear layers and expert stacks hold ``torch.float8_e4m3fn``. ``model.load_report`` says what happened.

    Args:
        path: folder, ``.safetensors`` file, or hub id.
        scheme: ``fp8_channel``, ``fp8_block``, ``fp8_tensor``, ``mxfp8``, a `Recipe` or its dict form; None loads
            without quantizing.
        device: where the model goes.
        ignore: patterns of weights to leave as they are; see `Recipe`.
        dtype: of everything that is not quantized; default: what the config says, as ``from_pretrained`` does.
        model_class: a transformers model class or auto class; default: what the config names.
        staging_bytes: bound on memory beyond the final model, on the host and on the device.
        threads: reader threads; default: one a core, at most 16.
        strict: whether checkpoint tensors that the model has no place for are an error. Missing ones always are.
        revision: of a hub id.
        trust_remote_code: let the checkpoint bring its own model code, as in transformers.
        attn_implementation: as in transformers.
        direct_io: True or False to read the files past the page cache or through it, when loading to an accelerator;
            by default, past it where they are not cached. Parts of tensors that lie scattered are always read through
            it, and so is all that is loaded to a CPU. Unless it is True, files that are not cached are read ahead into
            the page cache, up to half of the available memory, while transformers' code is imported.
        progress: True or False to show a bar or not, or a callable given bytes read and bytes in all; by default, a
            bar where the terminal can show one.

    Raises:
        OctavoError: see `octavo.errors`; no model is left behind.
    """
    stages = Stages()
    recipe = Recipe.coerce(scheme, ignore)
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
                ModelOptions(dtype, model_class, trust_remote_code, attn_implementation),
                stages=stages,
                strict=strict,
            )
    model, plan = prepared.model, prepared.plan

    def finish() -> None:
        with stages("finish"):
            _move_buffers(model, target_device)
            _tie(model, plan)

    options: dict[str, Any] = {"threads": threads, "direct_io": direct_io, "progress": progress}
    fill(model, checkpoint, plan, stages, **options, notes=plan.notes, finish=finish)
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
            _swap_saved(model, saved, checkpoint)
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


def _swap_saved(model: Any, config: Any, checkpoint: Checkpoint) -> None:
    try:
        config.swap(model)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quantization_config does not fit the model: "
            f"{type(error).__name__}: {error}"
        ) from error


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
