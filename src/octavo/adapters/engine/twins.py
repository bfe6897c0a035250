"""Where unquantized weights would go in layers that hold packed ones, whose parameters have other names.

For a dry run, each packed parameter has a twin beside it: by the name and in the shape that the unquantized weight has,
with the loader of its own. What goes into a twin is for that layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from ...conversion.packing import PACKED
from .cuts import unpacked


@contextlib.contextmanager
def twins(model: nn.Module, holders: Collection[str], each: int) -> Iterator[None]:
    """Have twins of these parameters meanwhile; of those that are not packed there are none.

    Args:
        each: how many numbers are one of a packed parameter.
    """
    made: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []  # with what was there before
    try:
        for holder in holders:
            layer, _, name = holder.rpartition(".")
            module = model.get_submodule(layer)
            packed: Any = module._parameters[name]
            # some models call a packed parameter by the other name, too
            known = module._parameters.get(unpacked(name), packed)
            if not name.endswith(PACKED) or known is not packed:
                continue
            twin: Any = torch.empty((*packed.shape[:-1], each * packed.shape[-1]), dtype=torch.bfloat16, device="meta")
            twin = twin.as_subclass(type(packed))  # whose loader may ask for its class
            twin.__dict__.update(packed.__dict__)
            made.append((module, dict(module._parameters)))
            module._parameters[unpacked(name)] = twin
        yield
    finally:
        for module, before in reversed(made):
            module._parameters.clear()
            module._parameters.update(before)
