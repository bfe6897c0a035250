"""What ``save_pretrained`` wrote of a quantized model, for another class of it: a base model for one with a head, say.

As in ``from_pretrained``, a model's name for its base model is dropped from names, or put before them. Numbers and
scales are looked for in the files before anything is loaded: transformers would initialise anew what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.packing import FLOATS, are_codes
from ...errors import CoverageError, raise_problems
from ...running import modules


def names_in(model: Any, weights: Mapping[str, Any]) -> dict[str, str]:
    """Names of weights in the model that was saved -> in this one; without those of a head that this one lacks.

    Raises:
        KeyError: a weight that belongs into this model, and is not there.
    """
    found, prefix = {}, f"{model.base_model_prefix}."
    for name in weights:
        near = _near(name, prefix)
        there = next((other for other in near if _has(model, other)), None)
        if there is not None:
            found[name] = there
        elif all(hasattr(model, other.partition(".")[0]) for other in near[:2]) or name.startswith(prefix):
            raise KeyError(name)
    return found


def check_files(model: Any, checkpoint: Checkpoint) -> None:
    """Raise for numbers and scales of a model, in their final form, that its files lack, or have in another form.

    Raises:
        CoverageError: naming all of them.
    """
    problems = list(_problems(model, checkpoint))
    advice = "Save the model again, or fetch its files again."
    raise_problems(CoverageError, f"{checkpoint.path} into {type(model).__name__}", problems, advice)


def _problems(model: Any, checkpoint: Checkpoint) -> Iterator[str]:
    tensors, prefix = checkpoint.tensors, f"{model.base_model_prefix}."
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for info in tensors.values():
        place = next((parameters[n] for n in _near(info.name, prefix) if n in parameters), None)
        coded = are_codes(info.dtype_name, len(info.shape))
        if coded and place is not None and place.is_floating_point() and place.dtype.itemsize > 1:
            yield f"{info.name} is {info.dtype_name}, and config.json lists no scheme for it"
    for weight, scheme, _ in modules.quantized_weights(model):
        for name in (weight, modules.scale_name(weight)):
            place = parameters[name]
            found = next((tensors[n] for n in _near(name, prefix) if n in tensors), None)
            what = f"{name} {list(place.shape)}, {dtypes.short(place.dtype)} of {scheme}"
            if found is None:
                yield f"missing: {what}"
            elif found.shape != tuple(place.shape) or not _holds(found.dtype_name, place.dtype):
                yield f"misshapen: {what}, is {list(found.shape)}, {found.dtype_name} in the files"


def _holds(stored: str, dtype: torch.dtype) -> bool:
    """Return True for the dtype itself; scales in float32 may have been stored as less."""
    return dtypes.MOVED[stored] == dtype or (stored in FLOATS and dtype == torch.float32)


def _near(name: str, prefix: str) -> tuple[str, str, str]:
    return name, name.removeprefix(prefix), prefix + name


def _has(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return leaf in model.get_submodule(path)._parameters
    except AttributeError:
        return False
