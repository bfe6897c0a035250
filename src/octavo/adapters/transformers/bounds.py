"""Bounds on the models that a config.json may describe, by what its checkpoint holds: building one costs by the module.

Billions of layers are a dozen bytes of a config, and hours and all memory here, before it is seen that no tensor of
the checkpoint belongs to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...errors import CheckpointError
from ...text import shown

#: more layers than a model has, whose checkpoint is not at hand as yet
_LAYERS = 1000


def check_layers(checkpoint: Checkpoint) -> None:
    """Raise a `CheckpointError` where the config has more layers than the checkpoint has tensors.

    Every number counts whose key speaks of layers: each architecture has its own keys, and no other value that such a
    key may have is nearly as large.
    """
    allowed = _LAYERS + len(checkpoint.tensors)
    for key, value in _values(checkpoint.config):
        if type(value) is int and "layer" in key and value > allowed:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: {shown(key)} is {shown(value)}, and the checkpoint has "
                f"{len(checkpoint.tensors):,} tensors: of such a config at most {allowed:,} are taken"
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
