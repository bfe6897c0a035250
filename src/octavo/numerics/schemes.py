"""The numeric definition of every scheme: amax, scale, quantize, dequantize. Plain torch, any device.

    w ≈ q.float() * scale          q: float8_e4m3fn [..., out, in], or int8

    scheme        a scale group is           scale of weight[out, in]
    fp8_channel   one row                    f32 [out, 1]
    fp8_block     128 x 128                  f32 [ceil(out/128), ceil(in/128)]
    fp8_tensor    the whole matrix           f32 []
    mxfp8         32 columns of one row      e8m0 [out, ceil(in/32)], a power of two
    int8_channel  one row                    f32 [out, 1]
    nvfp4         see `nvfp4`                f32 []

For the first three, ``scale = round_up_to_bf16(amax / 448)``: amax in float32, a true division, and the smallest
number of bf16 that is no smaller. Stock readers cast ``weight_scale`` to bf16; since bf16 can hold it, that changes
nothing. For int8_channel it is the same with 127. For mxfp8 it is ``2 ** ceil(log2(amax / 448))``, the smallest power
of two that is no smaller, at least 2**-127. Rounding *up* keeps ``|w / scale|`` at or below the largest number, so
nothing saturates. (OCP Microscaling Formats (MX) v1.0, section 6.3, rounds down, and saturates.) Where amax is 0 the
scale is 1.

``q = rne(w / scale)`` with the division in float32: to the nearest number of e4m3, or to the nearest integer.

Groups are those of one matrix, or of one *part* of its rows (see ``parts`` below); each matrix of a stack
``[experts, out, in]`` is quantized as if alone. Whatever piece of a matrix these functions are given, they compute the
same bytes: ``phase`` says where in its group the piece begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RecipeError
from . import nvfp4
from .constants import constant
from .groups import all_spans, cells_of_spans, grouped, spans
from .integers import divide_rows
from .terms import E8M0 as E8M0
from .terms import FP8 as FP8
from .terms import FP8_MAX as FP8_MAX
from .terms import HELD as HELD
from .terms import NUMBERS as NUMBERS
from .terms import SCHEMES as SCHEMES
from .terms import Scheme as Scheme
from .terms import Stored as Stored
from .terms import copy_into as copy_into
from .terms import get as get
from .terms import in_host_memory as in_host_memory
from .terms import region as region

#: torch spreads a reduction of so many elements that are not neighbours in memory over several thread blocks
_SPLIT = 1024
#: what makes the mantissa of a float32 above 1.75 carry: 2**23 less the bits of 0.75, less one
_ABOVE_448 = (1 << 23) - (3 << 21) - 1


# -- amax and scale ---------------------------------------------------------------------------------------------------


def group_amax(
    weight: Tensor,
    scheme: Scheme,
    *,
    phase: tuple[int, int] = (0, 0),
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Largest magnitude of each scale group of ``weight[..., out, in]`` -> float32 [..., row cells, column cells].

    Non-finite weights give non-finite results. On a CPU, magnitudes are compared as integers (the bits of a float
    without its sign are ordered as its magnitude is), several times faster than as floats.

    Args:
        weight: bf16, fp16 or fp32; any strides.
        phase: row and column of ``weight[..., 0, 0]`` within its scale group.
        scratch: as many elements as ``weight``, same dtype; spares an allocation on a CPU.
        out: where the result goes, if given.
    """
    on_cpu = weight.device.type == "cpu"
    if not on_cpu and scheme.by_row:  # there, views cost as well
        return row_amax(weight, out)
    row_spans = spans(weight.shape[-2], scheme.group_rows, phase[0])
    col_spans = spans(weight.shape[-1], scheme.group_cols, phase[1])
    if not on_cpu and len(row_spans) == len(col_spans) == 1:
        return _norm(grouped(weight, row_spans[0], col_spans[0]), out)
    values = _magnitude_bits(weight, scratch) if on_cpu else weight
    bands = []
    for rows in row_spans:
        band = [_amax(grouped(values, rows, cols)) for cols in col_spans]
        bands.append(band[0] if len(band) == 1 else torch.cat(band, -1))
    grid = bands[0] if len(bands) == 1 else torch.cat(bands, -2)
    grid = grid.contiguous().view(weight.dtype).float() if on_cpu else grid
    return grid if out is None else out.copy_(grid)


def row_amax(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Largest magnitude of each row of ``weight[..., out, in]`` on a GPU -> float32 [..., out, 1].

    torch splits a reduction over 1024 and more elements that are not neighbours in memory among blocks of threads,
    whose interim results take about 140 MB on an H100 (136 MiB were measured, for a block of 100 MB). So rows of a
    transposed source are reduced in segments, and these then.
    """
    cols = weight.shape[-1]
    if cols < _SPLIT or weight.stride(-1) <= weight.stride(-2):
        return _norm(weight, out, dim=-1, keepdim=True)
    rows = spans(weight.shape[-2], 1, 0)[0]
    segments = [_norm(grouped(weight, rows, span)) for span in spans(cols, _SPLIT // 2, 0)]
    joined = segments[0] if len(segments) == 1 else torch.cat(segments, -1)
    if out is None:
        return joined.amax(-1, keepdim=True)
    return torch.amax(joined, -1, keepdim=True, out=out)


def _magnitude_bits(weight: Tensor, scratch: Tensor | None) -> Tensor:
    """The bits without the sign, as integers."""
    integers = torch.int32 if weight.dtype == torch.float32 else torch.int16
    if scratch is None:
        bits = weight.view(integers) & torch.iinfo(integers).max
    else:
        bits = scratch.view(integers)[: weight.numel()].view(weight.shape)
        torch.bitwise_and(weight.view(integers), torch.iinfo(integers).max, out=bits)
    return bits


def _amax(groups: Tensor) -> Tensor:
    """[..., row cells, rows a cell, column cells, columns a cell] -> [..., row cells, column cells]."""
    if groups.is_floating_point():
        return _norm(groups)
    # rows first: reducing over an outer axis is the faster of the two
    tall = groups.squeeze(-3) if groups.shape[-3] == 1 else groups.amax(-3)
    return tall.squeeze(-1) if groups.shape[-1] == 1 else tall.amax(-1)


def _norm(
    values: Tensor, out: Tensor | None = None, *, dim: int | tuple[int, ...] = (-3, -1), keepdim: bool = False
) -> Tensor:
    """The largest magnitude on a GPU: the one reduction that takes the magnitude on the way."""
    norm: Tensor = torch.linalg.vector_norm(values, math.inf, dim, keepdim, dtype=torch.float32, out=out)
    return norm


def scale_from_amax(amax: Tensor, scheme: Scheme) -> Tensor:
    """amax, float32 -> scale, float32 of the same shape. See the module's docstring for the definition."""
    if scheme.packed:
        return nvfp4.global_scale(amax)
    if scheme.power_of_two:
        # an e8m0 byte is a float's exponent field; 448 is 1.75 * 2**8, and what is above 1.75 carries into the exponent
        exponent = ((amax.view(torch.int32).add(_ABOVE_448) >> 23) - 8).clamp_(min=0)
        # with a number, `where` would copy it to the device and wait
        exponent = exponent.masked_fill_(amax == 0, 127).masked_fill_(~torch.isfinite(amax), 255)
        return exponent.to(torch.uint8).view(E8M0).float()
    scale = amax / constant(scheme.numbers.largest, amax.device)
    positive = scale > 0
    scale.view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
    # 1 where the scale is 0; not a number where it is none (whose bits may overflow when rounded)
    return torch.where(positive, scale, 1.0 + amax)


def warm_up(device: torch.device) -> None:
    """Make the constants of a device, on the current stream of it."""
    known = torch.empty(0, device=device).device  # with the number that tensors' devices have
    for numbers in NUMBERS.values():
        constant(numbers.largest, known)
    nvfp4.warm_up(known)


def quantize_into(
    out: Stored,
    weight: Tensor,
    scale: Tensor,
    scheme: Scheme,
    *,
    phase: tuple[int, int] = (0, 0),
    scratch: Tensor | None = None,
) -> None:
    """Write the numbers of ``weight[..., out, in]`` into ``out`` of the same shape, given the scales of its groups.

    Args:
        out: as `Scheme.numbers_in` sees what is stored.
        scale: float32 [..., row cells, column cells], as `group_amax` and `scale_from_amax` give it.
        phase: as for `group_amax`.
        scratch: float32, as many elements as ``weight`` (or fewer, on a GPU); spares allocations.
    """
    if isinstance(out, nvfp4.Packed):
        nvfp4.quantize_into(out, weight, scale, scratch=scratch)
        return
    if weight.device.type != "cpu":
        divide_into(out, weight, scale, scheme, phase=phase, scratch=scratch)
        return
    if scratch is None or scratch.numel() < weight.numel():
        scratch = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
    wide = scratch[: weight.numel()].view(weight.shape).copy_(weight)
    quantize_in_place(out, wide, scale, scheme, phase=phase)


def quantize_in_place(
    out: Stored,
    wide: Tensor,
    scale: Tensor,
    scheme: Scheme,
    *,
    phase: tuple[int, int] = (0, 0),
    scratch: Tensor | None = None,
) -> None:
    """`quantize_into` of float32 in memory that may be overwritten."""
    if isinstance(out, nvfp4.Packed):
        nvfp4.quantize_into(out, wide, scale, scratch=scratch)
        return
    if wide.device.type != "cpu" and scheme.dtype.is_floating_point:
        divide_into(out, wide, scale, scheme, phase=phase)
        return
    for rows, cols in all_spans(wide, scheme.groups, phase):
        grouped(wide, rows, cols).div_(cells_of_spans(scale, rows, cols))
    out.copy_(wide if scheme.dtype.is_floating_point else wide.round_())


def divide_into(
    out: Tensor,
    weight: Tensor,
    scale: Tensor,
    scheme: Scheme,
    *,
    phase: tuple[int, int] = (0, 0),
    scratch: Tensor | None = None,
) -> None:
    """`quantize_into` on a GPU, which divides in float32 and rounds to FP8 in one kernel.

    (On a CPU that is slower than one after the other.) To integers it rounds by several, which need scratch memory.
    """
    if not scheme.dtype.is_floating_point:
        assert scheme.by_row
        divide_rows(out, weight, scale, scratch)
        return
    if scheme.by_row:  # views cost as well
        torch.div(weight, scale, out=out)
        return
    for rows, cols in all_spans(weight, scheme.groups, phase):
        torch.div(grouped(weight, rows, cols), cells_of_spans(scale, rows, cols), out=grouped(out, rows, cols))


def to_stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """float32 scales -> the dtype that is stored (exact in both directions)."""
    if scheme.power_of_two:
        return (scale.view(torch.int32) >> 23).to(torch.uint8).view(E8M0)
    return scale


# -- whole tensors ----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, scheme: str | Scheme, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a whole tensor: the definition that every streamed byte is compared with.

    Args:
        weight: bf16, fp16 or fp32 [..., out, in].
        scheme: a name of `SCHEMES`.
        parts: lengths of runs of rows that never share a scale group (fused gate and up); default: all rows.

    Returns:
        q: of the scheme's dtype and of `Scheme.stored_shape`; scale: as `Scheme.scale_shape` says.

    Raises:
        RecipeError: there are no rows or no columns, or so many that the scheme can't take them.
    """
    scheme, weight = get(scheme), weight.detach()
    if weight.ndim < 2 or 0 in weight.shape[-2:]:
        raise RecipeError(f"a tensor {list(weight.shape)} can't be quantized: it has no rows and columns")
    if why := scheme.unfit(weight.shape[-1]):
        raise RecipeError(f"a tensor {list(weight.shape)} can't be quantized: {scheme.name}: {why}")
    rows = weight.shape[-2]
    grids, out = [], torch.empty(scheme.stored_shape(weight.shape), dtype=scheme.dtype, device=weight.device)
    start = 0
    for part in parts or (rows,):
        piece = weight[..., start : start + part, :]
        grid = scale_from_amax(group_amax(piece, scheme), scheme)
        quantize_into(scheme.numbers_in(out[..., start : start + part, :]), piece, grid, scheme)
        grids.append(grid)
        start += part
    scale = to_stored(torch.cat(grids, -2), scheme)
    return out, scale.reshape(scheme.scale_shape(weight.shape, parts))


def row_scales(scale: Tensor, shape: Sequence[int], scheme: str | Scheme, parts: Sequence[int] | None = None) -> Tensor:
    """Stored scales -> float32 ``[..., out, column cells]``: those of each row of the weight."""
    scheme = get(scheme)
    *lead, rows, cols = shape
    grid = scale.float().reshape(*lead, -1, scheme.cells(rows, cols)[1])
    if scheme.group_rows == 1:
        return grid
    found, start = [], 0
    for part in parts or (rows,):
        stop = start + scheme.cells(part, cols)[0]
        found.append(grid[..., start:stop, :].repeat_interleave(scheme.group_rows or part, -2)[..., :part, :])
        start = stop
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def expand_scale(
    scale: Tensor, shape: Sequence[int], scheme: str | Scheme, parts: Sequence[int] | None = None
) -> Tensor:
    """Stored scales -> float32, broadcastable to ``[..., out, in]`` (one row a row of the weight)."""
    scheme = get(scheme)
    cells = row_scales(scale, shape, scheme, parts)
    return cells if scheme.group_cols is None else cells.repeat_interleave(scheme.group_cols, -1)[..., : shape[-1]]


def dequantize(
    q: Tensor,
    scale: Tensor,
    scheme: str | Scheme,
    parts: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``q.float() * scale``, rounded once to ``dtype``."""
    numbers = get(scheme).numbers_in(q)
    wide = nvfp4.widen(numbers) if isinstance(numbers, nvfp4.Packed) else q.float()
    return (wide * expand_scale(scale, wide.shape, scheme, parts)).to(dtype)


def error_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB: 20 log10(|w| / |w - w'|) with Frobenius norms; higher is better."""
    signal = torch.linalg.vector_norm(reference.float(), dtype=torch.float64).item()
    noise = torch.linalg.vector_norm(reference.float() - approximation.float(), dtype=torch.float64).item()
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf
