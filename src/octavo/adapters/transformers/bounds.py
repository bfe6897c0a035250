"""Bounds on the models that a config.json may describe, by what its checkpoint holds: building one costs by the module.

Billions of layers are a dozen bytes of a config, and hours and all memory here, before it is seen that no tensor of
the checkpoint belongs to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...errors import CheckpointError
from ...text import shown

#: more layers than a model has
_LAYERS = 256
#: more labels than a classifier has
_LABELS = 1_000_000
#: of torch's functions, models call less than four for each of their tensors; a few tensors may be made of one
_CALLS, _CALLS_EACH = 20_000, 40
#: tables of positions, masks: a model may compute so much, and so much for each byte of its checkpoint
_BUFFER_BYTES, _BUFFER_BYTES_EACH = 1 << 30, 4


def check_layers(checkpoint: Checkpoint) -> None:
    """Raise a `CheckpointError` where the config has more layers than the checkpoint has tensors.

    Every number counts whose key speaks of layers: each architecture has its own keys, and no other value that such a
    key may have is nearly as large, but for sizes of what layers are given (Gemma's ``vocab_size_per_layer_input``). So
    does each number of which transformers makes so many names before there is a model: of labels, and of GPT-Neo's
    kinds of attention.
    """
    layers = _LAYERS + len(checkpoint.tensors)
    for key, value in _values(checkpoint.config):
        allowed = _LABELS if key == "num_labels" else layers
        counts = list(_integers(value)) if key == "attention_types" else [value]
        counted = ("layer" in key and "size" not in key) or key in ("num_labels", "attention_types")
        if counted and any(type(count) is int and count > allowed for count in counts):
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: {shown(key)} is {shown(value)}, and the checkpoint has "
                f"{len(checkpoint.tensors):,} tensors: of such a config at most {allowed:,} are taken"
            )


def most_calls(checkpoint: Checkpoint) -> int:
    """How many functions of torch a model may call while it is built, which it does for each parameter."""
    return _CALLS + _CALLS_EACH * len(checkpoint.tensors)


def check_buffers(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise a `CheckpointError` where what the model computes is larger than any that belongs to this checkpoint."""
    allowed = _BUFFER_BYTES + _BUFFER_BYTES_EACH * checkpoint.nbytes
    needed = sum(buffer.nbytes for buffer in model.buffers())
    if needed > allowed:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: the model would compute {needed:,} bytes of tables, and the checkpoint "
            f"holds {checkpoint.nbytes:,}: of such a config at most {allowed:,} are taken"
        )


def _values(config: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a config and of its parts."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _integers(value: Any) -> Iterator[int]:
    """The integers in a list and in the lists within."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif type(part) is int:
            yield part
