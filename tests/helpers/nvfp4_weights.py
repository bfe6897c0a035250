"""Weights that try out a kernel which quantizes to NVFP4, and the ways in which they may lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from octavo.numerics import nvfp4

from . import DTYPES, random_weights

#: [experts, out, in]: no side a multiple of what a program takes
_SHAPE = (2, 37, 48)


def _normal(dtype: torch.dtype) -> Tensor:
    return random_weights(_SHAPE, dtype, 0)


def _heavy(dtype: torch.dtype) -> Tensor:
    """Groups of very different sizes: first scales below the least, too."""
    weight = random_weights(_SHAPE, torch.float32, 1)
    return (weight.sign() * weight.abs() ** 4 * torch.logspace(-4, 1, 37)[:, None]).to(dtype)


def _ties(dtype: torch.dtype) -> Tensor:
    return (torch.randint(-30, 31, _SHAPE, generator=torch.Generator().manual_seed(2)) / 4).to(dtype)


def _zeros(dtype: torch.dtype) -> Tensor:
    weight = random_weights(_SHAPE, dtype, 3)
    weight[0, 3], weight[1, :, 16:32], weight[:, 5, ::2] = 0, 0, -0.0
    return weight


def _bits(dtype: torch.dtype) -> Tensor:
    """Any finite numbers."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integers)
    bits = torch.randint(limits.min, limits.max, _SHAPE, generator=torch.Generator().manual_seed(4), dtype=integers)
    weight = bits.view(dtype)
    return torch.where(weight.isfinite(), weight, 0)


def _tiny(dtype: torch.dtype) -> Tensor:
    """Below what the least global scale is for; of float32 and bf16 subnormal."""
    return (random_weights(_SHAPE, torch.float32, 5) * 2.0**-130).to(dtype)


def _large(dtype: torch.dtype) -> Tensor:
    weight = random_weights(_SHAPE, dtype, 6)
    weight[0, 1] = torch.finfo(dtype).max
    weight[1, 2] = torch.finfo(dtype).min
    return weight


_ALL: dict[str, Callable[[torch.dtype], Tensor]] = {
    each.__name__[1:]: each for each in (_normal, _heavy, _ties, _zeros, _bits, _tiny, _large)
}
NAMES = list(_ALL)


def of(name: str) -> Iterator[Tensor]:
    """Of each dtype."""
    for dtype in DTYPES:
        yield _ALL[name](dtype)


def layouts(weight: Tensor) -> Iterator[Tensor]:
    """The same weights: as they are, transposed, with rows that begin anywhere, and every second element."""
    yield weight
    yield weight.mT.contiguous().mT
    yield torch.cat([weight[..., :3], weight], -1)[..., 3:]
    yield torch.stack([weight, weight], -1)[..., 0]


def on_gpu(weight: Tensor) -> Tensor:
    """The same with the same strides, and as many elements before it."""
    whole = weight.as_strided((weight.untyped_storage().nbytes() // weight.itemsize,), (1,), 0)
    return whole.cuda().as_strided(weight.shape, weight.stride(), weight.storage_offset())


def quantized(weight: Tensor, search: bool) -> Tensor:
    """What is stored of it, made on its device."""
    scale = nvfp4.global_scale(weight.float().abs().amax((-2, -1), keepdim=True))
    shape = (*weight.shape[:-1], nvfp4.stored_columns(weight.shape[-1]))
    stored = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    nvfp4.quantize_into(nvfp4.Packed.of(stored), weight, scale, search=search)
    return stored
