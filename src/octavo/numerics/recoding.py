"""FP8 under one scale becomes FP8 under another by integers, on a CPU: the bytes that float32 would give, sooner.

The definition is `decoding.decode_into` and then `schemes.quantize_in_place`, both steps in float32:

    q = rne(code * scale / target)

Within a *cell*, the columns of a row that share a scale, ``scale`` and ``target`` are constant. The bits of e4m3
without the sign count its numbers from 0 on, eight to a power of two, and float32 rounds alike whatever the exponent.
So, where code and result are normal numbers, what is to be added to the bits of a code depends on its three bits of
mantissa alone. For each cell, eight products by the definition tell it. It is least for the mantissa 0, since the bits
are a chord of the logarithm, and larger by two at most: for the others it is more by less than 1.4, and then rounded.
So it is one number for a cell, and two bits for each mantissa, which together are an int16, out of which each code
shifts its own.

What is not normal, before or after, is a few of a million weights as models have them. These go the way of the
definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..checkpoint.codings import Decoding
from .groups import Span, spans
from .schemes import FP8, Scheme

#: so many times the elements that scratch memory has are recoded at once
AT_ONCE = 4
#: cells of fewer columns are not worth eight products
_LEAST_COLUMNS = 64
#: so many weights may not be normal: with more, the definition is as fast
_MOST_ODD = 1 / 64
#: products with smaller scales may be subnormal to float32, and are then rounded otherwise
_LEAST_SCALE = 2.0**-110
_MANTISSAS = torch.arange(8, 16, dtype=torch.float32, device="cpu")
#: where each has its two bits
_PLACES = 1 << torch.arange(0, 16, 2, dtype=torch.int32, device="cpu")
#: half of what is cut off of the bits of float32, less one; and less the bits of the mantissas themselves
_ROUNDING = (1 << 19) - 1 - _MANTISSAS.view(torch.int32)
#: twice the magnitudes of the smallest normal number, and of what is no number
_NORMAL, _NAN = 16, 254


def recodes(dtype: torch.dtype, decoding: Decoding, scheme: Scheme) -> bool:
    """Return True if `recode_into` can make a scheme's numbers of codes of this dtype, and is worth it."""
    wide = decoding.group_cols is None or decoding.group_cols >= _LEAST_COLUMNS
    return dtype == scheme.dtype == FP8 and scheme.group_cols is None and scheme.group_rows in (1, None) and wide


def recode_into(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    target: Tensor,
    decoding: Decoding,
    *,
    phase: int = 0,
    scratch: tuple[Tensor, Tensor],
) -> bool:
    """Write the numbers of a scheme into ``out``, e4m3 [..., rows, columns], given codes of which all are numbers.

    False where the definition has to write them, since many are not normal, say.

    Args:
        codes: of the shape of ``out``.
        scale: float32 [..., rows, column cells], as `decoding.scale_cells` gives it.
        target: float32 [..., rows or 1, 1], under which no weight is above 448.
        phase: column of ``codes[..., 0]`` within its scale group.
        scratch: twice float32, of `AT_ONCE` times as many elements ``out`` may have.
    """
    if scale.amin().item() < _LEAST_SCALE:
        return False
    return all(
        _recode(_cells(out, cols), _cells(codes, cols), scale[..., cols.cell : cols.cell + cols.cells], target, scratch)
        for cols in spans(codes.shape[-1], decoding.group_cols, phase)
    )


def _cells(x: Tensor, cols: Span) -> Tensor:
    """[..., columns] within a span as int8 [..., cells, columns a cell]."""
    return x.view(torch.int8)[..., cols.start : cols.stop].view(*x.shape[:-1], cols.cells, cols.each)


def _recode(out: Tensor, codes: Tensor, scale: Tensor, target: Tensor, scratch: tuple[Tensor, Tensor]) -> bool:
    """`recode_into` of codes [..., rows, cells, columns a cell]."""
    count, shape = codes.numel(), codes.shape
    whole = -(-count // 64) * 64
    if max(2 * 8 * scale.numel(), whole // 4) > scratch[0].numel():
        return False  # so narrow that eight products take more room than codes
    least, table = _table(scale, target, scratch[0])
    limit = torch.rsub(least, _NORMAL, alpha=2).clamp_(_NORMAL, _NAN).to(torch.uint8)
    limits, tables, added = (found.unsqueeze(-1).expand(shape) for found in (limit, table, least.to(torch.int8)))
    odd = scratch[0].view(torch.uint8)[:whole]
    odd[count:] = 0
    is_odd = odd[:count].view(shape)
    # so many at once that a core's cache holds what is computed
    for part in _parts(shape, scratch[1].numel()):
        _add(out[part], codes[part], is_odd[part], limits[part], tables[part], added[part], scratch[1])
    places = _ones(odd)
    if places.numel() > _MOST_ODD * count:
        return False
    if places.numel():
        cells = places // shape[-1]
        at: tuple[Tensor, ...] = (places,)
        if out.is_contiguous() and codes.is_contiguous():
            out, codes = out.view(-1), codes.view(-1)
        else:
            at = torch.unravel_index(places, shape)
        wide = codes[at].view(FP8).float().mul_(scale.reshape(-1)[cells])
        wide.div_(target.expand(*scale.shape[:-1], 1).reshape(-1)[cells // shape[-2]])
        out[at] = wide.to(FP8).view(torch.int8)
    return True


def _add(out: Tensor, codes: Tensor, odd: Tensor, limit: Tensor, table: Tensor, added: Tensor, scratch: Tensor) -> None:
    """Write what codes become if all is normal, and whether it is not."""
    count, shape = codes.numel(), codes.shape
    shifted = scratch.view(torch.int16)[:count].view(shape)
    made = scratch.view(torch.int8)[2 * count : 3 * count].view(shape)
    # the sign falls out
    torch.add(codes, codes, out=made)
    torch.lt(made.view(torch.uint8), limit, out=odd)
    # twice the mantissa is where its two bits are
    shifted.copy_(made.bitwise_and_(14))
    torch.bitwise_right_shift(table, shifted, out=shifted)
    torch.add(made.copy_(shifted).bitwise_and_(3).add_(codes), added, out=out)


def _parts(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into boxes of at most so many elements, in the order of all; whole are the axes that aren't named."""
    each = math.prod(shape[1:])
    step = max(1, limit // each)
    for start in range(0, shape[0], step):
        if each > limit:
            yield from ((slice(start, start + 1), *rest) for rest in _parts(shape[1:], limit))
        else:
            yield (slice(start, start + step),)


def _ones(odd: Tensor) -> Tensor:
    """The places of bytes that are 1, a few among zeros; looked for where the sum of eight times eight is not 0."""
    eights = odd.view(torch.int64).view(8, -1)
    hits = eights.sum(0).nonzero().squeeze(-1)
    which, hit, byte = eights.index_select(1, hits).view(torch.uint8).view(8, -1, 8).nonzero().unbind(-1)
    return (which * eights.shape[1] + hits[hit]) * 8 + byte


def _table(scale: Tensor, target: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """For each cell: the least that is added to the bits of a code, int32, and for mantissas what more, int16."""
    axes, count = (8, *(1,) * scale.ndim), 8 * scale.numel()
    wide, even = (scratch[start : start + count].view(8, *scale.shape) for start in (0, count))
    even = even.view(torch.int32)
    products = torch.mul(scale, _MANTISSAS.view(axes), out=wide).div_(target).view(torch.int32)
    # to the nearest with three bits of mantissa, and of two to the even one
    torch.bitwise_right_shift(products, 20, out=even).bitwise_and_(1)
    added = products.add_(even).add_(_ROUNDING.view(axes)).bitwise_right_shift_(20)
    least = added[0].clone()
    return least, added.sub_(least).mul_(_PLACES.view(axes)).sum(0, dtype=torch.int32).to(torch.int16)
