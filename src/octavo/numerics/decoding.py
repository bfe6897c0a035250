"""What the numbers of a quantized checkpoint stand for, in float32. Plain torch, any device.

    w = (number - zero point) * scale

    number           stored as                                                    scale is stored as
    float8           FP8 of any kind                                              float32, bf16, fp16, or e8m0
    int8             int8                                                         float32, bf16, fp16
    int4_in_int32    eight in an int32, the lowest four bits first, plus 8        float32, bf16, fp16
    int8_in_int32    four in an int32, the lowest eight bits first, plus 128      float32, bf16, fp16
    e2m1             two in a byte, the lower half first                          e8m0 (MXFP4), e4m3 (NVFP4)

A stored scale becomes float32 first, which is exact. A *global scale*, of which there is one for a matrix, then
multiplies it (ModelOpt) or divides it (compressed-tensors), rounded to float32. All numbers less their zero points are
exact in float32, so that each weight is rounded once more at most: by the multiplication.

Whatever box of a matrix these functions are given, they compute the same bytes: ``phase`` says where in its scale group
the box begins.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.codings import Decoding
from . import compiling, nvfp4
from .constants import pairs
from .groups import all_spans, cells_of_spans, count_cells, grouped
from .schemes import E8M0, FP8

#: what a number packed into an integer is raised by, so that it is no negative one
_OFFSETS = {"int4_in_int32": 8, "int8_in_int32": 128}
#: dtype -> by how many bits its numbers have to be shifted, to lie as those of fp16
_SHIFTS = {torch.float8_e4m3fn: 7, torch.float8_e5m2: 8}
#: kinds of FP8 whose bytes, without the sign, are ordered as their numbers are, and above these what is no number
ORDERED = tuple(_SHIFTS)
#: a scale below this may be multiplied by a power of two that numbers lack
_FAR_FROM_OVERFLOW = 2.0**100
#: the numbers of four bits, by their codes
_NIBBLES = {"e2m1": nvfp4.VALUES, "int4_in_int32": tuple(float(code - _OFFSETS["int4_in_int32"]) for code in range(16))}


class Source(NamedTuple):
    """Codes of a box and the scales that it has a part in, in the axes of the source: rows, and then columns."""

    codes: Tensor  # as stored, [..., rows, words]; those of a row lie beside each other
    scale: Tensor  # as stored, [..., row cells, column cells]
    global_scale: Tensor | None  # of one element
    decoding: Decoding
    phase: tuple[int, int]  # row and column of the first weight within its scale group
    head: int  # columns of the first word that lie before the box
    cols: int  # of the box


def scale_cells(scale: Tensor, decoding: Decoding, global_scale: Tensor | None = None) -> Tensor:
    """Stored scales -> float32 of the same shape, the global scale worked in.

    Args:
        scale: [..., row cells, column cells] in the dtype that is stored; bytes are e8m0.
        global_scale: one for each matrix, broadcastable to ``scale``.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(E8M0)
    wide = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    factor = _widen(wide, scale)
    if factor != 1:
        wide.mul_(factor)
    if global_scale is None:
        return wide
    # a tensor, since torch on a GPU divides by a number by multiplying with its rounded reciprocal
    by = global_scale.float()
    return wide.div_(by) if decoding.divided else wide.mul_(by)


def zero_cells(stored: Tensor, decoding: Decoding, rows: int, head: int = 0) -> Tensor:
    """Stored zero points -> float32 [..., rows, column cells].

    Args:
        stored: [..., rows, column cells]; of numbers packed into integers, rows are packed, too: [..., words, ...].
        head: rows of the first word that lie before those that are meant.
    """
    if decoding.kind not in _OFFSETS:
        return stored.float()
    words = stored.transpose(-1, -2).contiguous()
    wide = torch.empty((*words.shape[:-1], rows), dtype=torch.float32, device=stored.device)
    _numbers(wide, words, decoding, head)
    return wide.transpose(-1, -2).contiguous()


def decode_into(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    decoding: Decoding,
    *,
    zero_point: Tensor | None = None,
    phase: tuple[int, int] = (0, 0),
    head: int = 0,
    scratch: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Write the weights of a box into ``out``, float32 [..., rows, columns].

    Args:
        codes: the box as it is stored, [..., rows, words] for columns that are packed into words.
        scale: `scale_cells` of the groups that the box has a part in.
        zero_point: `zero_cells` of the same groups.
        phase: row and column of ``out[..., 0, 0]`` within its scale group.
        head: columns of the first word that lie before the box.
        scratch: float32, as many elements as ``out``; spares an allocation.
        checked: whether it is known that all codes are numbers, and no scale is 2**100 or more.
    """
    if not out.numel():
        return
    factor = _numbers(out, codes, decoding, head, scratch, checked)
    if factor != 1:
        # where that can't overflow, on its way into the product: both are multiplied exactly
        if checked or scale.amax().item() < _FAR_FROM_OVERFLOW:
            scale = scale * factor
        else:
            out.mul_(factor)
    for rows, cols in all_spans(out, (decoding.group_rows, decoding.group_cols), phase):
        part = grouped(out, rows, cols)
        if zero_point is not None:
            part.sub_(cells_of_spans(zero_point, rows, cols))
        part.mul_(cells_of_spans(scale, rows, cols))


def row_amax(
    codes: Tensor, scale: Tensor, decoding: Decoding, *, phase: int = 0, scratch: Tensor | None = None
) -> Tensor:
    """The largest magnitude of each row of FP8, float32 [..., rows, 1], without decoding it.

    It is that of the decoded weights: without their sign, codes are ordered as the numbers are, and rounding a product
    with a scale keeps the order. Where a code is no number, neither is the result.

    Args:
        codes: of a dtype in `ORDERED`.
        scale: as for `decode_into`, those of each row.
        phase: column of ``codes[..., 0, 0]`` within its scale group.
        scratch: as many bytes as ``codes``; spares an allocation.
    """
    held = None if scratch is None else scratch.view(torch.int8)[: codes.numel()].view(codes.shape)
    magnitudes = torch.bitwise_and(codes.view(torch.int8), 0x7F, out=held)
    found = []
    for rows, cols in all_spans(codes, (1, decoding.group_cols), (0, phase)):
        largest = grouped(magnitudes, rows, cols).squeeze(-3).amax(-1).view(codes.dtype)
        found.append(cells_of_spans(scale, rows, cols).squeeze(-1).squeeze(-2) * largest.float())
    return (found[0] if len(found) == 1 else torch.cat(found, -1)).amax(-1, keepdim=True)


def decode(
    shape: tuple[int, ...],
    codes: Tensor,
    scale: Tensor,
    decoding: Decoding,
    *,
    zero_point: Tensor | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """A whole tensor of this shape, float32: the definition that every streamed box is compared with.

    Args:
        codes, scale, zero_point, global_scale: as they are stored, in the shapes that `scale_cells`, `zero_cells` and
            `decode_into` take.
    """
    out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    zeros = (
        None if zero_point is None else zero_cells(zero_point, decoding, count_cells(shape[-2], decoding.group_rows))
    )
    decode_into(out, codes, scale_cells(scale, decoding, global_scale), decoding, zero_point=zeros)
    return out


def bad_scale(scale: Tensor) -> str | None:
    """Say which of the stored scales is none: negative, zero, not finite. None if all are good.

    A scale of e4m3 may be 0, as which a group is stored whose weights are tiny beside those of its matrix.
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(E8M0)
    wide = scale.float()
    good = (wide >= 0 if scale.dtype == FP8 else wide > 0) & torch.isfinite(wide)
    if bool(good.all()):
        return None
    first = (~good).nonzero()[0].tolist()
    return f"a scale is {wide[tuple(first)].item():g}, at {first}"


# -- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(
    out: Tensor, codes: Tensor, decoding: Decoding, head: int, scratch: Tensor | None = None, checked: bool = False
) -> float:
    """Write the numbers themselves, as float32; returns the power of two by which they are still to be multiplied."""
    if decoding.pack == 1:
        return _widen(out, codes, scratch, checked)
    values = codes.shape[-1] * decoding.pack
    # two float32 at a time are written, which have to lie where eight bytes may
    fits = values == out.shape[-1] and out.is_contiguous() and out.storage_offset() % 2 == 0
    wide = out if fits else torch.empty((*codes.shape[:-1], values), dtype=torch.float32, device=out.device)
    # flat, and said so: of an axis of one element the stride may be any, which torch does not view as bytes
    whole = codes.contiguous().as_strided((codes.numel(),), (1,)).view(torch.uint8)
    if decoding.kind == "int8_in_int32":
        wide.copy_(whole.view(wide.shape)).sub_(_OFFSETS[decoding.kind])
    else:
        table = pairs(_NIBBLES[decoding.kind], out.device)
        torch.index_select(table, 0, whole.int(), out=wide.view(-1).view(torch.int64))
    if not fits:
        out.copy_(wide[..., head : head + out.shape[-1]])
    return 1


def _widen(out: Tensor, numbers: Tensor, scratch: Tensor | None = None, checked: bool = False) -> float:
    """Write numbers as float32; returns the power of two by which they are still to be multiplied.

    FP8 on a CPU is widened ten times as fast as by torch, by way of fp16, whose bits are like its.
    """
    shift = _SHIFTS.get(numbers.dtype)
    # of e4m3 that is no number, fp16 would make 480
    if numbers.device.type != "cpu" or shift is None or (shift == 7 and not checked and holds_nan(numbers)):
        out.copy_(numbers)
        return 1
    held = torch.empty(numbers.numel(), dtype=torch.float32) if scratch is None else scratch
    bits = held.view(torch.int16)[: numbers.numel()].view(numbers.shape).copy_(numbers.view(torch.int8))
    bits.mul_(1 << shift)  # which is faster than to shift
    if shift == 8:
        out.copy_(bits.view(torch.float16))
        return 1
    # the sign was extended into the exponent, whose bias is eight larger in fp16
    out.copy_(bits.bitwise_and_(~0x4000).view(torch.float16))
    return 256


def holds_nan(numbers: Tensor) -> bool:
    """Return True if any byte is that of an e4m3 which is not a number: 0x7F or 0xFF, the largest integers."""
    if not numbers.numel():
        return False
    return numbers.view(torch.int8).amax().item() == 0x7F or numbers.view(torch.uint8).amax().item() == 0xFF


# -- kernels ----------------------------------------------------------------------------------------------------------


@functools.cache
def kernel(device: torch.device) -> Any:
    """`decoding_kernel`, or None where Triton does not compile for a device: it is tried."""
    if device.type != "cuda" or not compiling.may(device):
        return None

    def attempt() -> Any:
        from . import decoding_kernel

        codes, scale = torch.zeros((1, 16), dtype=FP8, device=device), torch.ones((1, 1), device=device)
        out, found = torch.empty_like(codes), torch.zeros((2, 1), device=device)
        source = Source(codes, scale, None, Decoding("float8", 1, None), (0, 0), 0, 16)
        for _ in range(2):  # the second launch goes past what Triton promises to keep
            decoding_kernel.quantize_into(out, found[:1], source, (1, None), found[1], lossless=False, window=None)
        return decoding_kernel

    return compiling.tried(attempt, "codes are decoded by torch's operations")
