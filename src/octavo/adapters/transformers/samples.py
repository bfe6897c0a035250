"""Quantized tensors with data, and the weights that they stand for: what transformers computes is seen on a few."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ...checkpoint.header import TensorInfo
from ...conversion import packing
from ...conversion.formats import scheme_by_scale
from ...numerics import schemes
from ...numerics.nvfp4 import Packed


@dataclass
class Sample:
    """Tensors by name, in the form that they have on disk."""

    given: dict[str, torch.Tensor] = field(default_factory=dict)  # as the checkpoint has them
    meant: dict[str, torch.Tensor] = field(default_factory=dict)  # as one that is not quantized would
    infos: dict[str, TensorInfo] = field(default_factory=dict)  # of both


def make_sample(sources: Iterable[str], tensors: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> Sample | None:
    """Random numbers for some tensors and their scales; None where a scale is of no scheme that is known."""
    made, generator = Sample(), torch.Generator().manual_seed(0)
    ends = (packing.SHAPE, packing.GLOBAL)
    beside = {*scales.values(), *(name.removesuffix(packing.PACKED) + end for name in scales for end in ends)}
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
        if found.packed:
            codes, groups = (part.contiguous() for part in Packed.of(q))
            name = info.name + packing.GLOBAL
            made.given |= {source: codes, scale.name: groups, name: (1 / grid).reshape(1)}
            made.infos |= {scale.name: scale, name: tensors[name]}
            continue
        made.given[source] = packing.flip(q).view(torch.int32) if packed else q
        stored = grid.view(torch.uint8) if found.power_of_two else grid.to(scale.dtype)
        made.given[scale.name] = stored.reshape(scale.shape)
        made.infos[scale.name] = scale
        if packed:
            name = info.name + packing.SHAPE
            made.given[name], made.infos[name] = packing.shape_tensor(info.shape), tensors[name]
    return made
