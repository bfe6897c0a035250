"""A Triton kernel that takes codes and scales to what becomes of them, in one launch: the bytes of plain torch.

By `decoding` what codes stand for, and by `schemes` and `lossless` the scales and the numbers of FP8 that are made of
it; or what codes stand for, in a dtype of half precision or in float32; or codes as they are. Nothing is kept in memory
between. Whatever is no scale, no number, or not finite is noticed in one cell of memory.

Imported only where Triton is installed. Every operation on floats is rounded once, to nearest: divisions are asked for
as such, since Triton's own are approximate, and no product is added to anything.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checkpoint.codings import Decoding
from .decoding import Source
from .groups import Groups, count_cells
from .nvfp4_kernel import to_e4m3
from .schemes import E8M0, FP8, Scheme

#: kinds of numbers, by how their bytes are read
_E4M3, _E5M2, _INT8, _RAISED8, _E2M1, _RAISED4 = range(6)
_KINDS = {"int8": _INT8, "int8_in_int32": _RAISED8, "e2m1": _E2M1, "int4_in_int32": _RAISED4}
_FLOATS = {torch.float8_e4m3fn: _E4M3, torch.float8_e5m2: _E5M2}
#: how scales are stored: in a dtype of floats, or bytes of which these are the bits
_PLAIN, _OF_BF16, _OF_E8M0, _OF_E4M3 = range(4)
_SCALES = {torch.bfloat16: _OF_BF16, torch.uint8: _OF_E8M0, E8M0: _OF_E8M0, FP8: _OF_E4M3}
_BITS = {torch.bfloat16: torch.int16, E8M0: torch.uint8, FP8: torch.uint8, torch.int8: torch.uint8}
#: what is made: numbers of FP8 under scales that bf16 can hold, or powers of two times a unit; weights; the same codes
_USUAL, _POWERS, _WEIGHTS, _CODES = range(4)
#: columns that a program takes at a time: of wide scale groups, and of narrow ones or of blocks
_COLUMNS, _FEW, _WARPS = 256, 32, 4
#: weights in a program's registers at once; of blocks, twice as many
_HELD = 8 * _COLUMNS
#: far below this are numbers of elements for which 32 bits do
_ENDLESS = 1 << 30


@triton.jit(
    do_not_specialize=[
        "codes", "scale", "unit", "out", "scales", "bad", "rows", "cols", "head", "row_phase", "col_phase",
        "group_rows", "group_cols", "wide", "width", "first", "last", "codes_lead", "codes_row", "scale_lead",
        "scale_row", "scale_col", "out_lead", "out_row", "out_col", "scales_lead", "scales_row", "scales_col",
    ]
)  # fmt: skip
def _kernel(
    codes, scale, unit, out, scales, bad,
    rows, cols, head, row_phase, col_phase, group_rows, group_cols, wide, width, first, last,
    codes_lead, codes_row, scale_lead, scale_row, scale_col, out_lead, out_row, out_col,
    scales_lead, scales_row, scales_col,
    KIND: tl.constexpr, SCALE: tl.constexpr, GLOBAL: tl.constexpr, MAKES: tl.constexpr, OUT: tl.constexpr,
    BLOCKS: tl.constexpr, APART: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Matrices [rows, cols]; a line is what of a row lies in one of ``wide`` groups that have ``width`` columns each.

    Stored are the columns from ``first`` up to ``last``. GLOBAL: 1 where a global scale multiplies, 2 where it divides.
    OUT: 1 where weights are the bits of bf16, or scales those of e8m0; 2 where weights are fp16.
    """
    if BLOCKS:  # a program has one group, of LINES rows
        each = tl.cdiv(rows, LINES) * wide
        program = tl.program_id(0) % each
        row = program // wide * LINES + tl.arange(0, LINES)
        group = tl.full((LINES,), program % wide, tl.int32)
        cell = tl.full((LINES,), program // wide, tl.int32)
    else:
        each = tl.cdiv(rows * wide, LINES)
        program = tl.program_id(0) % each
        row = (program * LINES + tl.arange(0, LINES)) // wide
        group = (program * LINES + tl.arange(0, LINES)) % wide
        cell = row
    lead = (tl.program_id(0) // each).to(tl.int64)
    there = row < rows
    codes_at = codes + (lead * codes_lead + row.to(tl.int64) * codes_row)[:, None]
    scale_at = scale + (lead * scale_lead + ((row_phase + row) // group_rows).to(tl.int64) * scale_row)[:, None]
    out_at = out + (lead * out_lead + row.to(tl.int64) * out_row)[:, None]
    # lines of a program have the same columns, unless they are APART: then less is computed
    start = (group * width)[:, None] if APART else tl.zeros((1, 1), tl.int32) + tl.max(group, 0) * width
    stop = tl.minimum(start + width, cols)
    step = tl.arange(0, COLUMNS)[None, :]
    # as bits, which are ordered as magnitudes are, and above these what is none; reduced once, at the end
    largest = tl.zeros((LINES, COLUMNS), tl.int32)
    if MAKES != 3:  # _CODES
        for at in range(0, width, COLUMNS):
            col = start + at + step
            mask = there[:, None] & (col < stop) & (at + step < width)
            value, none = _decoded(
                codes_at, scale_at, unit, col, mask, head, col_phase, group_cols, scale_col, KIND, SCALE, GLOBAL
            )
            bits = tl.where(none > 0, 0x7FFFFFFF, 0)
            if MAKES == 2:  # _WEIGHTS
                if OUT == 2:
                    half = value.to(tl.float16)
                    infinite = (half.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0x7F800000
                    finite = (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
                    bits = tl.where(infinite & finite & mask, 0x7FFFFFFF, bits)
                    stored = half
                elif OUT == 1:
                    stored = _to_bf16(value).to(tl.int16)
                else:
                    stored = value
                kept = mask & (col >= first) & (col < last)
                tl.store(out_at + (col - first).to(tl.int64) * out_col, stored, mask=kept)
            else:
                bits = tl.where(mask, tl.maximum(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, bits), 0)
            largest = tl.maximum(largest, bits)
    if MAKES < 2:
        amax = tl.max(largest, 1)
        if BLOCKS:
            amax = tl.zeros((LINES,), tl.int32) + tl.max(amax, 0)
        amax = amax.to(tl.float32, bitcast=True)
        if MAKES == 0:
            by = tl.div_rn(amax, tl.full((LINES,), 448.0, tl.float32))
            rounded = ((by.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
            by = tl.where(by > 0, rounded, 1.0)
        else:
            by = _power(amax, unit, GLOBAL, LINES)
        to = scales + lead * scales_lead + cell.to(tl.int64) * scales_row + group.to(tl.int64) * scales_col
        alone = there
        if BLOCKS:
            alone = there & (tl.arange(0, LINES) == 0)
        if OUT == 1:
            tl.store(to, (by.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=alone)
        else:
            tl.store(to, by, mask=alone)
        for at in range(0, width, COLUMNS):
            col = start + at + step
            mask = there[:, None] & (col < stop) & (at + step < width)
            value, none = _decoded(
                codes_at, scale_at, unit, col, mask, head, col_phase, group_cols, scale_col, KIND, SCALE, GLOBAL
            )
            bits = tl.div_rn(value, tl.broadcast_to(by[:, None], (LINES, COLUMNS))).to(tl.int32, bitcast=True)
            found = tl.minimum(to_e4m3((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)), 0x7F)
            kept = mask & (col >= first) & (col < last)
            found |= (bits >> 24) & 0x80
            tl.store(out_at + (col - first).to(tl.int64) * out_col, found.to(tl.uint8), mask=kept)
    if MAKES == 3:
        for at in range(0, width, COLUMNS):
            col = start + at + step
            mask = there[:, None] & (col < stop) & (at + step < width)
            byte = tl.load(codes_at + col + head, mask=mask, other=0).to(tl.int32)
            if KIND == 0:  # _E4M3
                largest = tl.where((byte & 0x7F) == 0x7F, 0x7FFFFFFF, largest)
            if KIND == 1:  # _E5M2
                largest = tl.where((byte & 0x7F) >= 0x7C, 0x7FFFFFFF, largest)
            if KIND == 3:  # _RAISED8
                byte = byte ^ 128
            kept = mask & (col >= first) & (col < last)
            tl.store(out_at + (col - first).to(tl.int64) * out_col, byte.to(tl.uint8), mask=kept)
    tl.store(bad, float("inf"), mask=tl.max(tl.max(largest, 1), 0) >= 0x7F800000)


@triton.jit
def _decoded(
    codes_at, scale_at, unit, col, mask, head, col_phase, group_cols, scale_col,
    KIND: tl.constexpr, SCALE: tl.constexpr, GLOBAL: tl.constexpr,
):  # fmt: skip
    """Weights, float32, and where a scale of them is none: integers."""
    at = col + head
    if KIND >= 4:  # two in a byte
        byte = tl.load(codes_at + at // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> ((at & 1) * 4)) & 15
    else:
        code = tl.load(codes_at + at, mask=mask, other=0).to(tl.int32)
    if KIND == 0:  # by way of fp16, whose bits are like theirs
        bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
    elif KIND == 1:
        number = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == 2:
        number = (code - ((code & 0x80) << 1)).to(tl.float32)
    elif KIND == 3:
        number = (code - 128).to(tl.float32)
    elif KIND == 4:
        bits = ((code & 7) << 9) | ((code & 8) << 12)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    else:
        number = (code - 8).to(tl.float32)
    stored = tl.load(scale_at + ((col_phase + col) // group_cols).to(tl.int64) * scale_col, mask=mask, other=1)
    by, good = _scale(stored, unit, SCALE, GLOBAL)
    return number * by, (mask & (good == 0)).to(tl.int32)


@triton.jit
def _scale(stored, unit, SCALE: tl.constexpr, GLOBAL: tl.constexpr):
    """Scales as float32, the global scale worked in, and whether they are any."""
    if SCALE == 0:
        by = stored.to(tl.float32)
    elif SCALE == 1:
        by = (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif SCALE == 2:
        exponent = stored.to(tl.int32)
        bits = tl.where(exponent == 0, 0x400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        by = bits.to(tl.float32, bitcast=True)
    else:
        exponent = stored.to(tl.int32)
        bits = ((exponent & 0x7F) << 7) | ((exponent & 0x80) << 8)
        by = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        by = tl.where((exponent & 0x7F) == 0x7F, float("nan"), by)
    good = by < float("inf")
    good = good & (by >= 0 if SCALE == 3 else by > 0)
    if GLOBAL > 0:
        globally = tl.zeros_like(by) + tl.load(unit)
        by = by * globally if GLOBAL == 1 else tl.div_rn(by, globally)
        good = good & (globally > 0) & (globally < float("inf"))
    good = good & (by < 1267650600228229401496703205376.0)  # 2**100
    return by, good


@triton.jit
def _power(amax, unit, GLOBAL: tl.constexpr, LINES: tl.constexpr):
    """`lossless_scale`."""
    multiple = amax
    if GLOBAL > 0:
        half = tl.full((LINES,), 1.5, tl.float32)
        globally = tl.zeros((LINES,), tl.float32) + tl.load(unit)
        whole = half * globally if GLOBAL == 1 else tl.div_rn(half, globally)
        multiple = (_to_bf16(tl.div_rn(amax, whole)) << 16).to(tl.float32, bitcast=True)
    # 448 is 1.75 * 2**8, and what is above 1.75 carries into the exponent
    exponent = tl.maximum(((multiple.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 0)
    exponent = tl.where(multiple == 0, 127, exponent)
    by = tl.where(exponent == 0, 0x400000, exponent << 23).to(tl.float32, bitcast=True)
    if GLOBAL > 0:
        by = tl.maximum(by * whole, 1.1754943508222875e-38)
        by = tl.where(amax == 0, 1.0, by)
    return by


@triton.jit
def _to_bf16(value):
    """The bits of the nearest number of bf16, of two the even one."""
    bits = value.to(tl.int32, bitcast=True)
    none = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(none, ((bits >> 16) & 0xFFFF) | 0x40, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)


@triton.jit(
    do_not_specialize=[
        "scale", "out", "bad", "count", "rows", "cols", "lead", "row", "col", "to_lead", "to_row", "to_col",
    ]
)  # fmt: skip
def _scales_kernel(
    scale, out, bad, count, rows, cols, lead, row, col, to_lead, to_row, to_col,
    SCALE: tl.constexpr, OUT: tl.constexpr, EACH: tl.constexpr
):  # fmt: skip
    """Scales of ``count`` cells, of matrices [rows, cols], as float32, or (OUT: 1) as the bits of e8m0."""
    index = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    mask = index < count
    matrix, of_row, of_col = index // (rows * cols), index % (rows * cols) // cols, index % cols
    at = matrix * lead + of_row * row + of_col * col
    to = matrix * to_lead + of_row * to_row + of_col * to_col
    by, good = _scale(tl.load(scale + at, mask=mask, other=1), scale, SCALE, 0)
    if OUT == 1:
        tl.store(out + to, (by.to(tl.int32, bitcast=True) >> 23).to(tl.uint8), mask=mask)
    else:
        tl.store(out + to, by, mask=mask)
    tl.store(bad, float("inf"), mask=tl.max((mask & (good == 0)).to(tl.int32), 0) > 0)


# -- launching --------------------------------------------------------------------------------------------------------


def takes(codes_dtype: torch.dtype, decoding: Decoding) -> bool:
    """Return True if there is a kernel for codes of this kind."""
    return decoding.kind in _KINDS or codes_dtype in _FLOATS


def makes(scheme: Scheme, groups: Groups, globally: bool) -> bool:
    """Return True if there is a kernel that makes this of codes whose rows and columns are in such scale groups.

    Args:
        groups: rows and columns of the source that share a scale of the scheme.
        globally: there is a global scale.
    """
    rows, cols = groups
    if scheme.dtype != FP8 or (scheme.power_of_two and globally) or rows is None:
        return False
    return rows == 1 or (cols is not None and rows in (16, 32, 64, 128))


def quantize_into(
    out: Tensor, scales: Tensor, source: Source, groups: Groups, bad: Tensor, *, lossless: bool, window: slice | None
) -> None:
    """Write numbers and scales of whole scale groups.

    Args:
        out: FP8 [..., rows, columns]; those of the window, if there is one. Any strides.
        scales: [..., row cells, column cells], as the scheme stores them; any strides.
        groups: rows and columns that share one, as `makes` takes them.
        bad: float32; becomes infinite if anything is no scale, no number, or not finite.
        lossless: scales are those of `lossless`.
        window: columns that are wanted; None: all.
    """
    powers = scales.dtype == E8M0
    _launch(source, out, scales, bad, _POWERS if lossless or powers else _USUAL, int(powers), groups, window)


def decode_into(out: Tensor, source: Source, bad: Tensor, window: slice | None) -> None:
    """Write what codes stand for, as float32, bf16 or fp16; ``bad``, if of a scale, or fp16 has no such number."""
    kind = {torch.bfloat16: 1, torch.float16: 2}.get(out.dtype, 0)
    _launch(source, out, None, bad, _WEIGHTS, kind, (1, None), window)


def copy_into(out: Tensor, scales: Tensor, source: Source, bad: Tensor, window: slice | None) -> None:
    """Write codes as numbers of a scheme, one an element, and all scales as it stores them."""
    _launch(source, out, None, bad, _CODES, 0, (1, None), window)
    scale = source.scale
    *lead, rows, cols = scale.shape
    count = scale.numel()
    kind = _SCALES.get(scale.dtype, _PLAIN)
    each = 1024
    tensors = _as_bits(scale), _as_bits(scales), bad
    strides = [(x.stride(0) if lead else 0, *x.stride()[-2:]) for x in (scale, scales)]
    numbers = (count, rows, cols, *strides[0], *strides[1])
    _run(_scales_kernel, -(-count // each), tensors, numbers, (kind, int(scales.dtype == E8M0), each))


def _as_bits(tensor: Tensor) -> Tensor:
    bits = _BITS.get(tensor.dtype)
    return tensor if bits is None else tensor.view(bits)


def _launch(
    source: Source, out: Tensor, scales: Tensor | None, bad: Tensor, made: int, kind: int, groups: Groups,
    window: slice | None,
) -> None:  # fmt: skip
    """Launch the kernel; of all tensors, one axis at most is in front of the rows."""
    codes, scale, unit, decoding, phase, head, cols = source
    device = codes.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(source, out, scales, bad, made, kind, groups, window)
        return
    rows = out.shape[-2]
    first, last = (0, cols) if window is None else (window.start, window.stop)
    count = out.shape[0] if out.ndim == 3 else 1
    if not count * rows * cols:
        return
    width = groups[1] or cols
    wide = count_cells(cols, groups[1])
    if groups[0] == 1:
        columns = _COLUMNS if width > _FEW else _FEW
        lines = _HELD // columns
        each = triton.cdiv(rows * wide, lines)
    else:
        lines, columns = groups[0] or rows, _FEW
        each = triton.cdiv(rows, lines) * wide
    to = out if scales is None else scales
    item = codes.element_size()
    # of more bytes than one, torch views as bytes what has stride 1, which an axis of one element may lack
    codes_bytes = (codes if item == 1 else codes.as_strided((1,), (1,))).view(torch.uint8)
    lead = out.ndim == 3
    numbers = (
        rows, cols, head, *phase, decoding.group_rows or _ENDLESS, decoding.group_cols or _ENDLESS, wide, width,
        first, last,
        codes.stride(0) * item if lead else 0, codes.stride(-2) * item, scale.stride(0) if lead else 0,
        *scale.stride()[-2:], out.stride(0) if lead else 0, *out.stride()[-2:], to.stride(0) if lead else 0,
        *to.stride()[-2:],
    )  # fmt: skip
    constants = (
        _KINDS.get(decoding.kind, _FLOATS.get(codes.dtype)), _SCALES.get(scale.dtype, _PLAIN),
        0 if unit is None else 2 if decoding.divided else 1, made, kind, groups[0] != 1, groups[0] == 1 and wide > 1,
        lines, columns,
    )  # fmt: skip
    tensors = codes_bytes, _as_bits(scale), bad if unit is None else unit, _as_bits(out), _as_bits(to), bad
    _run(_kernel, count * each, tensors, numbers, constants)


#: (kernel, device, what decides which binary it is) -> the binary, as a launch takes it
_compiled: dict[Any, Any] = {}
# before, what a compiled kernel is launched with was another selection of its arguments
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def _run(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], constants: tuple[Any, ...]
) -> None:
    """Launch a kernel; from the second time on without Triton's own binding of arguments, which takes longer."""
    device = tensors[0].get_device()
    key = (id(kernel), device, *(tensor.dtype for tensor in tensors), *constants, max(numbers) >> 31)
    binary = _compiled.get(key)
    if binary is not None:
        run, function, metadata = binary
        stream = triton.runtime.driver.active.get_current_stream(device)
        addresses = [tensor.data_ptr() for tensor in tensors]
        # no launch metadata, no hooks before and after; nothing is assumed of addresses and numbers
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)
        return
    found = kernel[(programs, 1, 1)](*tensors, *numbers, *constants, num_warps=_WARPS, enable_fp_fusion=False)
    if _DIRECT and found is not None and not max(numbers) >> 31:
        _compiled[key] = found.run, found.function, found.packed_metadata
