"""Quantized tensors with data, and the weights that they stand for: what transformers computes is seen on a few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...checkpoint.header import TensorInfo
from ...conversion import packing
from ...conversion.formats import scheme_by_scale
from ...numerics import schemes


@dataclass
class Sample:
    """Tensors by name, in the form that they have on disk."""

    given: dict[str, torch.Tensor] = field(default_factory=dict)  # as the checkpoint has them
    meant: dict[str, torch.Tensor] = field(default_factory=dict)  # as one that is not quantized would
    infos: dict[str, TensorInfo] = field(default_factory=dict)  # of both


def make_sample(sources: Iterable[str], tensors: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> Sample | None:
    """Random numbers for some tensors and their scales; None where a scale is of no scheme that is known."""
    made, generator = Sample(), torch.Generator().manual_seed(0)
    beside = {*scales.values(), *(name.removesuffix(packing.PACKED) + packing.SHAPE for name in scales)}
    for source in (source for source in sources if source not in beside):
        packed = packing.unpacked(tensors[source], source.removesuffix(packing.PACKED)) if source in scales else None
        info = packed or tensors[source]
        plain = torch.randn(info.shape, generator=generator)
        made.infos |= {source: tensors[source], info.name: info}
        if source not in scales:
            made.given[source] = made.meant[source] = plain.to(info.dtype)
            continue
        scale = tensors[scales[source]]
        found = scheme_by_scale(info.shape, scale, info.dtype)
        if found is None:
            return None
        q, grid = schemes.quantize(plain, found)
        made.meant[info.name] = schemes.dequantize(q, grid, found)
        made.given[source] = packing.flip(q).view(torch.int32) if packed else q
        stored = grid.view(torch.uint8) if found.power_of_two else grid.to(scale.dtype)
        made.given[scale.name] = stored.reshape(scale.shape)
        made.infos[scale.name] = scale
        if packed:
            name = info.name + packing.SHAPE
            made.given[name], made.infos[name] = packing.shape_tensor(info.shape), tensors[name]
    return made
