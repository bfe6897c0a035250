"""Where the tensors of a checkpoint would go whose names are the hub's, in a model that was loaded from other names.

``save_pretrained`` writes a quantized model under the model's own names: stacks of experts, say. A trainer that sends
what checkpoints of the architecture have (a matrix for each expert) is understood all the same. transformers tells
their names and shapes, by its conversion mapping run backwards on tensors without memory, and where they go, by that
mapping run forwards, as when a checkpoint is loaded.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...checkpoint import dtypes
from ...checkpoint.header import TensorInfo
from ...elements.pieces import Piece, contiguous_strides
from ...elements.symbolic import Symbolic
from ...errors import passes
from ...planning.routes import Routes
from ...running import modules
from .building import unallocated
from .model_plan import trace


def usual_routes(model: nn.Module) -> Routes | None:
    """Where tensors go whose names a checkpoint may have and the model has not; None where there are none."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        return _routes(model, _without_weights(model))
    except Exception as error:  # of a class that can't be built from its config alone, names stay unknown
        if passes(error):
            raise
        return None


def _routes(model: nn.Module, own: Any) -> Routes | None:
    state, problems = own.state_dict(), list[str]()
    infos = {
        name: TensorInfo(name, dtypes.NAMES[tensor.dtype], tuple(tensor.shape), 0, 0, 0)
        for name, tensor in revert_weight_conversion(own, dict(state)).items()
    }
    if infos.keys() <= state.keys():
        return None
    traced = trace(own, infos, problems)
    if problems:
        return None
    parameters = dict(model.named_parameters())
    pieces: dict[str, list[tuple[str, Piece]]] = {}
    for name, symbolic in traced.found.items():
        for piece in _as_stored(model, name, symbolic).pieces if name in parameters else ():
            if piece.src_name not in state:
                pieces.setdefault(piece.src_name, []).append((name, piece))
    shapes = {name: infos[name].shape for name in pieces}
    return Routes({name: tuple(found) for name, found in pieces.items()}, shapes, {}, {})


def _without_weights(model: PreTrainedModel) -> Any:
    """A model of the same class and config, on meta, that nothing has quantized."""
    config, cls = deepcopy(model.config), cast("Any", type(model))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with unallocated(model.dtype, values=False):
        return cls._from_config(config, dtype=None)


def _as_stored(model: nn.Module, name: str, symbolic: Symbolic) -> Any:
    """A parameter in the shape that it has when it is quantized."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if modules.scale_name(leaf) not in module._parameters:
        return symbolic
    shape, strides = modules.as_stored(module, leaf, tuple(symbolic.shape), contiguous_strides(tuple(symbolic.shape)))
    flipped = strides[-1] > strides[-2]
    made: torch.Tensor = symbolic.view((*shape[:-2], shape[-1], shape[-2]) if flipped else shape)
    return made.transpose(-1, -2) if flipped else made
