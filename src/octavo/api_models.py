"""The public functions for models that exist already; see `octavo.api` for all of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint.checkpoint import Checkpoint
from .checkpoint.packing import FLOATS
from .choices import DEFAULT_FORMAT, DEFAULT_SCHEME, DEFAULT_STAGING_BYTES
from .conversion import formats
from .conversion.iterate import iterate
from .conversion.packing import PACKED
from .errors import LoaderError, public
from .machine import require_values
from .planning.recipe import Recipe
from .session import LayerwiseReport, Session, Transform, update_model


@public(LoaderError)
def update(
    model: nn.Module,
    pairs: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    transform: Transform | None = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    more: bool = False,
) -> LayerwiseReport:
    """Give a loaded model new weights in place: those of a trainer, all or some, in any order.

    Each tensor is requantized into the storage that exists, to the bytes that loading it would have given. Addresses,
    parameters and modules stay what they are, so that captured CUDA graphs stay valid.

    Args:
        model: A model that `load` loaded, or ``from_pretrained`` with an `octavo.OctavoConfig`.
        pairs: ``(name, tensor)`` in bf16, fp16 or fp32, on the CPU or the model's device; names are the checkpoint's or
            the model's own. What they don't name stays as it is. A state dict will do: a tied parameter is written once
            if its tensors are equal. An iterator may use a tensor's memory again when it is asked for the next; from a
            dict or a list, copies from pinned memory need not be awaited one by one. FP8 or int8 may come, too, with
            scales under the names ``X.weight_scale_inv`` or ``X.weight_scale``, before or after it; it passes through
            where the model has the same. Or a checkpoint in these, which is streamed: a folder, a ``.safetensors`` file
            or a hub id.
        transform: A function of each name and tensor that returns the pair or pairs to take instead, None for none.
        staging_bytes: A bound in bytes on memory beside each tensor. 256 MiB by default, at least 1 MiB.
        more: Whether another call follows that is part of the same update, as where a trainer sends buckets. What has
            come without its other half then waits for it, in at most ``staging_bytes`` (or a single tensor).

    Returns:
        Which layers were updated, and how long it took; in ``waiting``, what waits for the next call. All calls of one
        update return the same report, which goes on.

    Raises:
        UpdateError: It failed midway: an unknown name, a wrong shape, integers, a weight that is not finite. It tells
            which layers are new and which are old. Running the whole update again heals.
        LoaderError: The model holds no weights that octavo quantized.

    Examples:
        >>> from safetensors.torch import load_file
        >>> model = octavo.load("path/to/model")
        >>> report = octavo.update(model, load_file("path/to/model/model.safetensors"))
    """
    require_values()
    if not isinstance(pairs, (str, os.PathLike)):
        return update_model(model, pairs, transform, staging_bytes, more, _usual_routes)
    with contextlib.closing(_stored(pairs, staging_bytes)) as stored:
        return update_model(model, stored, transform, staging_bytes, more, _usual_routes)


def _usual_routes(model: nn.Module) -> Any:
    """Where tensors go by the names of checkpoints, in a model of transformers that has others."""
    if "transformers" not in sys.modules:
        return None
    from .adapters.transformers.usual_names import usual_routes

    return usual_routes(model)


def _stored(path: str | os.PathLike[str], staging_bytes: int) -> Generator[tuple[str, Tensor], None, None]:
    """The tensors of a checkpoint as they are stored, scales and all."""
    checkpoint = Checkpoint.open(path)
    for name, info in checkpoint.tensors.items():
        stem = name.removesuffix(PACKED)
        scale = checkpoint.tensors.get(f"{stem}_scale")
        if info.dtype is None or info.dtype.is_floating_point or scale is None:
            continue
        if info.dtype != torch.int8 or scale.dtype_name not in FLOATS or f"{stem}_zero_point" in checkpoint.tensors:
            raise LoaderError(
                f"{checkpoint.path}: {name} is quantized as {info.dtype_name}, and octavo.update takes checkpoints in "
                "bf16, fp16, fp32, FP8 and int8 without zero points. Load this one with octavo.load."
            )
    plan, layout = formats.plan_for(checkpoint, Recipe(None), DEFAULT_FORMAT, staging_bytes)
    yield from iterate(checkpoint, plan, layout)


@public(LoaderError)
def layerwise(
    model: nn.Module,
    finish: str | Recipe | Mapping[str, Any] | Callable[[nn.Module], nn.Module | None] | None = DEFAULT_SCHEME,
    device: str | torch.device | None = None,
    *,
    transform: Transform | None = None,
    direct: bool = True,
    duplicates: str = "error",
    optional: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
) -> Session:
    """Let a model load itself, each layer quantized the moment it is complete.

    The session is a context manager. Inside, parameters have no storage until the first write to them.
    ``model.load_weights(pairs)`` works as it is, and so do ``session.load(pairs)`` and any function that is given
    ``session.pairs(pairs)``. When it is left, boxes must have tiled every parameter. Entered again, it updates the
    loaded model in place.

    Args:
        model: Any module. Its parameters may be on meta, or real: they give their memory back.
        finish: What becomes of a complete layer, a layer being a module with parameters of its own. A scheme, a
            `Recipe` or its dict form: octavo quantizes it. A function: it is called once with each layer, and changes
            it in place or returns the module that takes its place. None: layers stay as loaded.
        device: Where the layers go. By default where their parameters are, and the CPU for those on meta.
        transform: A function of each name and tensor that returns the pair or pairs to take instead, None for none.
        direct: Whether writes go straight into FP8 where boxes hold whole scale groups, so that no layer exists in
            high precision. A loader that changes in place what earlier tensors wrote needs False.
        duplicates: ``"error"``, or ``"update"`` to let a later tensor win where two fill one box.
        optional: Globs of parameters whose values are right when no tensor comes.
        staging_bytes: A bound in bytes on memory beside layer and loader. 256 MiB by default, at least 1 MiB.

    Returns:
        The session. ``session.report`` says what each layer took, ``session.events`` what happened, in order;
        ``session.record(path)`` makes a plan of what the loader would do, and ``session.stream(plan)`` carries it out.

    Raises:
        RecipeError: The recipe can't be honoured on this model.
        LoaderError: Inside the session: a loader that does what can't be followed, or a ``finish`` that fails.
        CoverageError: At once, where two tensors write one box; on leaving, where nothing wrote one.
        UpdateError: An update failed midway; it tells which layers are new and which are old.
        OctavoError: As for `load`: a device that can't be used, a weight that is not finite.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 128))
        >>> pairs = [("0.weight", torch.randn(128, 256)), ("0.bias", torch.zeros(128))]
        >>> with octavo.layerwise(model, "fp8_channel") as session:
        ...     session.load(pairs)
        >>> print(session.report)
    """
    require_values()
    return Session(
        model,
        finish,
        device,
        transform=transform,
        direct=direct,
        duplicates=duplicates,
        optional=optional,
        staging_bytes=staging_bytes,
    )


__all__ = ["layerwise", "update"]
