"""Scales for FP8 under which weights that are quantized already stay what they are, as far as that is possible.

Numbers of e2m1 have two bits of significand, and those of FP8 (e4m3) four: one is the other times a power of two. So a
source whose scales are powers of two stays exact under scales that are powers of two: MXFP4, and FP8 in blocks with
such scales. Of these, the smallest is taken that lets nothing saturate, as for mxfp8:

    scale = 2 ** ceil(log2(amax / 448))

No other power of two keeps more. A weight is exact if ``w / scale`` is a multiple of 2**-9: in a scale group of the
target, exponents of MXFP4 may differ by 14, and by more where the numbers themselves leave room.

Of NVFP4, a weight is ``v * t * g``, with v of e2m1, t of e4m3, and the global scale g. ``v * t`` has up to six bits,
so no scale keeps all. With ``unit = 1.5 * g`` and ``scale = unit * 2 ** k``, where k follows from ``amax / unit`` as
above, 1.5, 3 and 6 times any t are exact, and 0.5, 1, 2 and 4 times those t whose significand is a multiple of three.
These are 65 % of normally distributed weights, with an error of 37 dB over all, where the scale of other sources gives
31.5; with ``unit = g``, 77 % are exact, and the error is 33 dB. This scale is no number of bf16. A reader that rounds
it changes the weights of a group alike, by at most 2**-9.

Below 2**-126, float32 has fewer bits, and a scale could come out too small for the largest weight. So it is 2**-126 at
least, under which FP8 has all multiples of 2**-135 next to 0; bf16 ends at 2**-133.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.codings import Decoding
from .groups import Groups, all_spans, cells_of_spans, grouped
from .schemes import FP8, Scheme, get, scale_from_amax

#: the smallest number of float32 that has all bits
_LEAST = torch.finfo(torch.float32).tiny


def keeps(decoding: Decoding, scheme: Scheme) -> bool:
    """Return True if `lossless_scale` keeps more of this source than the scale that a scheme has for others."""
    if scheme.dtype != FP8 or decoding.kind not in ("e2m1", "float8"):
        return False
    return decoding.powers or (decoding.kind == "e2m1" and not scheme.power_of_two)


def unit_of(decoding: Decoding, global_scale: Tensor | None) -> Tensor | None:
    """What scales are a power of two times of, float32; None: 1."""
    if global_scale is None:
        return None
    most = torch.full_like(global_scale, 1.5, dtype=torch.float32)  # a tensor: a GPU divides by no number
    return most / global_scale.float() if decoding.divided else most * global_scale.float()


def lossless_scale(amax: Tensor, unit: Tensor | None = None) -> Tensor:
    """amax, float32 -> scale, float32 of the same shape.

    Args:
        amax: of the groups of the target, as `schemes.group_amax` gives it.
        unit: `unit_of` the source, broadcastable to ``amax``.
    """
    if unit is None:
        return scale_from_amax(amax, get("mxfp8"))
    # what may round the quotient up or down is not to double a scale: FP8 ends half a step above 448
    multiple = (amax / unit).bfloat16().float()
    scale = (scale_from_amax(multiple, get("mxfp8")) * unit).clamp_(min=_LEAST)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def count_exact(weight: Tensor, q: Tensor, scale: Tensor, groups: Groups, phase: tuple[int, int] = (0, 0)) -> int:
    """How many weights are kept: quantized and read as bf16, they are what the source is, read as bf16.

    Args:
        weight: float32 [..., out, in], as `decoding.decode_into` gives it.
        q: what was made of it; scale: float32 [..., row cells, column cells].
        groups, phase: rows and columns of a scale group, and where in its group the first weight is.
    """
    wide = q.float()
    for rows, cols in all_spans(wide, groups, phase):
        grouped(wide, rows, cols).mul_(cells_of_spans(scale, rows, cols))
    return int((wide.bfloat16() == weight.bfloat16()).sum())
