"""The memory of a placement, made of views of parameters that were remembered: checked before it is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...conversion.formats import Format
from ...numerics import schemes
from ...numerics.nvfp4 import E4M3, Packed
from ...planning.placement import Placement
from ...streaming.sinks import Memory, PackedStorage, Storage, WordStorage
from ..remembering.checked import require
from .placing import memory_like


def memory_of(placement: Placement, views: Sequence[Tensor | None], layout: Format, device: str) -> Memory:
    """What a stream can write a placement into.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or devices are not those of the placement.
    """
    first, scale, *more = views
    require(views, first is not None and len(more) <= 1)
    assert first is not None
    require(first, {str(view.device) for view in views if view is not None} == {device})
    if placement.scheme is None or scale is None:
        require(placement, placement.scheme is None and scale is None and not more)
        require(first, first.shape == placement.stored_shape and first.dtype == placement.dtype)
        return Storage(first)
    if more:
        return _apart(placement, first, scale, more[0])
    found = memory_like(first, scale, placement.scheme, layout)
    numbers = found.words.view(placement.dtype) if isinstance(found, WordStorage) else first
    require(first, numbers.shape == placement.stored_shape and numbers.dtype == placement.dtype)
    if isinstance(found, WordStorage):
        require(first, first.dtype == torch.int32 and scale.is_floating_point())
    else:
        require(scale, scale.dtype == schemes.get(placement.scheme).scale_dtype)
    scale.view(placement.scale_grid)  # as the stream will
    return found


def _apart(placement: Placement, codes: Tensor, scales: Tensor, divisor: Tensor | None) -> PackedStorage:
    shapes = Packed.boxes(placement.stored_shape)
    require(placement, placement.scheme is not None and schemes.get(placement.scheme).packed)
    require(codes, codes.shape == shapes[0] and codes.dtype == placement.dtype)
    require(scales, scales.shape == shapes[1] and scales.dtype == E4M3)
    require(divisor, divisor is not None and divisor.dtype == torch.float32)
    assert divisor is not None
    divisor.view(placement.scale_grid)  # as the stream will
    return PackedStorage(Packed(codes, scales), divisor)
