"""Where a checkpoint and a model may differ, as in transformers: tensors that are not needed, or may be missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.header import TensorInfo


def unneeded(model: Any, names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Checkpoint tensors that the model does without -> why."""
    ignorable = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    # tables that older versions of a model saved, and newer ones compute (position_ids, inv_freq)
    computed = {name.rpartition(".")[2] for name in dict(model.named_buffers()).keys() - model.state_dict().keys()}
    found = {}
    for name in names:
        if name.rpartition(".")[2] in computed:
            found[name] = "the model computes this buffer"
        elif any(pattern.search(name) for pattern in ignorable):
            found[name] = "this architecture ignores it"
        elif _is_mask(tensors[name]):
            found[name] = "a causal mask, which older versions of the architecture saved"
    return found


def _is_mask(info: TensorInfo) -> bool:
    """Return True for a causal mask, or for the number that it writes over what is masked."""
    leaf = info.name.rpartition(".")[2]
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return (leaf == "bias" and square) or (leaf == "masked_bias" and not info.shape)


def computed(model: Any, missing: Iterable[str]) -> dict[str, Tensor]:
    """The values of parameters and buffers that no checkpoint of this architecture needs to hold (tables of positions).

    That is what it says itself; and what transformers then makes of them is the same each time, and not random.
    """
    allowed = _patterns(model, "_keys_to_ignore_on_load_missing")
    owners: dict[str, list[str]] = {}
    for name in missing:
        if any(pattern.search(name) for pattern in allowed):
            path, _, leaf = name.rpartition(".")
            owners.setdefault(path, []).append(leaf)
    found = {}
    with torch.random.fork_rng(devices=[]):
        for path, leaves in owners.items():
            first, second = (_initialised(model, path, leaves) for _ in range(2))
            for leaf in leaves:
                if torch.equal(first[leaf], second[leaf]):  # which NaN that nothing has touched are not
                    found[f"{path}.{leaf}" if path else leaf] = first[leaf]
    return found


def _initialised(model: Any, path: str, leaves: list[str]) -> dict[str, Tensor]:
    """What the initialisation of the model around a module makes of some of its parameters and buffers."""
    module = model.get_submodule(path)
    around = path
    while not hasattr(model.get_submodule(around), "_init_weights"):
        around = around.rpartition(".")[0]
    places = {leaf: module._buffers if leaf in module._buffers else module._parameters for leaf in leaves}
    before = {leaf: places[leaf][leaf] for leaf in leaves}
    for leaf, tensor in before.items():
        new = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else -1, device="cpu")
        places[leaf][leaf] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
    try:
        with torch.no_grad(), torch.device("cpu"):  # from_pretrained makes all else on meta
            model.get_submodule(around)._init_weights(module)
        return {leaf: places[leaf][leaf].detach() for leaf in leaves}
    finally:
        for leaf, tensor in before.items():
            places[leaf][leaf] = tensor


def new_heads(model: Any, missing: Iterable[str]) -> list[str]:
    """Parameters of a head that this class adds to the model that was saved, and that is to be trained."""
    prefix = model.base_model_prefix
    saved = type(model).__name__ in (model.config.architectures or ())
    if saved or not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return []
    return [name for name in missing if not name.startswith(f"{prefix}.")]


def _patterns(model: Any, name: str) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in getattr(model, name, None) or ()]
