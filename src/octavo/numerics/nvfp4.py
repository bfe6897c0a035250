"""NVFP4: numbers of four bits in groups of 16 columns, each group with a scale of e4m3.

Plain torch, any device; on a GPU, `nvfp4_kernel` makes the same bytes in one launch, where Triton compiles.

    w ≈ number * scale * global scale

    number         e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    scale          float8_e4m3fn, one for 16 columns of a row
    global scale   float32, one for the matrix: a power of two, by its largest magnitude

**The global scale** keeps scales within what e4m3 holds. With n the smallest integer such that ``amax <= 1728 * 2**n``
(which is 6 * 288, see below), it is

    2**-8                     where -17 <= n <= -8: an amax above 0.0066 and up to 6.75
    2**(n + 9)                below, at least 2**-115
    2**(-8 + 4 * k)           above, with the smallest k that makes it no smaller than 2**n

As a power of two, it leaves ``number * scale * global scale`` exact in bf16, in any order, so that all readers have the
same weights. And it is the same for all ordinary weights: engines join layers to one (q, k and v, or gate and up), and
take one global scale for all of these. There is room for that in e4m3: scales keep their four bits down to groups whose
amax is a 28th of the matrix's at worst.

**The scale** of a group is the one of four numbers of e4m3 that has the least squared error. The *first* is the nearest
to ``amax / 6`` (amax: the group's, by the global scale; quotients rounded to float32), but 2**-9 at least, and 1 where
the amax is 0. The others are the 1st, 4th and 5th number of e4m3 after it, 448 at most: the next one, and two around
1.5 times the first, by which the largest weight becomes 4. None clips: by the first, the largest weight is 6.375 at
most, nearer to 6 than those between 4 and 6 may be to either (9 where that is 2**-9). Of equals, the first is taken.
Where the global scale is its largest, 2**120, a scale above 40 becomes 40, lest a finite weight become an infinite one.

**Errors** are compared in integers, so that they are the same in whatever order they are added. With r the product,
rounded to float32, of ``|w|`` and 28 / (first scale * global scale), which is rounded to float32 before and after the
multiplication with 28, a weight counts as ``(floor(r) + 1/2) / 28`` of the first scale. Its error under a scale is its
distance to the nearest number times that scale, in first scales; squared, in 1024ths, rounded to the nearest integer
(halves up), at most 4095. The errors of all weights by all scales are a table (`_errors`).

With ``search=False`` the first scale is taken, as round-to-nearest has it in other libraries.

**The number** is the nearest to ``w / (scale * global scale)``, rounded to float32; of two, the even code.

**Stored** are, in each row, the numbers, two to a byte, the first of the two in the lower half, and after them the
scales: uint8 [..., out, in / 2 + in / 16]. `Packed` sees both.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..machine import in_memory
from . import compiling
from .constants import constant, pairs

#: columns that share a scale
GROUP = 16
#: bytes of such a group: eight of numbers, and its scale
_BYTES = GROUP // 2 + 1
E4M3 = torch.float8_e4m3fn
#: the numbers, by their codes
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: what makes the mantissa of a float32 above that of 1728, 1.6875 * 2**10, carry: 2**23 less the bits of 0.6875, less 1
_ABOVE_1728 = (1 << 23) - (11 << 19) - 1
#: the exponent field of 2**-8; for how many smaller exponents it still is; and the steps above, as a shift
_USUAL, _WITHIN, _STEP, _LEAST = 127 - 8, 9, 2, 127 - 115
#: how many numbers of e4m3 further on the scales lie that are tried
_TRIED = (0, 1, 4, 5)
_ONE, _FORTY = 0x38, 0x62  # as bits of e4m3
#: of its first scale, a weight is known to 28ths while scales are compared; a row of the table has as many as there are
_PARTS, _ROW = 28, 256
#: the unit of squared errors, and the largest
_UNIT, _MOST = 1024, 4095
#: above twice four times what a weight is by its scale: 9 at most, where the first scale is the least of all
_SIDE = 80
#: of four numbers of 16 bits, the first and the third
_EVEN = 0xFFFF_0000_FFFF
#: elements that are quantized at a time: on a CPU so that a core's cache holds what is made of them, and where no
#: memory is given for that
_AT_ONCE, _AT_ONCE_ON_DEVICE = 1 << 17, 1 << 21
#: float32 that each takes
_SCRATCH = 5


def stored_columns(cols: int) -> int:
    """Bytes of a row of so many columns."""
    return cols // GROUP * _BYTES


def columns(stored: int) -> int:
    """Columns of a row of so many bytes."""
    return stored // _BYTES * GROUP


class Packed(NamedTuple):
    """A box of a matrix or of a stack: views of what is stored."""

    codes: Tensor  # uint8 [..., out, in / 2]
    scales: Tensor  # float8_e4m3fn [..., out, in / 16]

    @classmethod
    def of(cls, stored: Tensor) -> Packed:
        """Numbers and scales of stored rows."""
        groups = stored.shape[-1] // _BYTES
        cut = groups * GROUP // 2
        return cls(stored[..., :cut], stored[..., cut:].view(E4M3))

    @staticmethod
    def boxes(size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset, size or shape of weights -> the same of codes, and of scales."""
        return (*size[:-1], size[-1] // 2), (*size[:-1], size[-1] // GROUP)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in]."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    def box(self, off: Sequence[int], size: Sequence[int]) -> Packed:
        """A box of it, whose columns begin and end at multiples of 16."""
        assert off[-1] % GROUP == size[-1] % GROUP == 0
        boxes = zip(self, Packed.boxes(off), Packed.boxes(size), strict=True)
        return Packed(*(_view(tensor, start, shape) for tensor, start, shape in boxes))


def _view(tensor: Tensor, off: Sequence[int], size: Sequence[int]) -> Tensor:
    """A box of a tensor, in one operation: on a GPU, launching is what takes time."""
    strides = tensor.stride()
    return tensor.as_strided(size, strides, tensor.storage_offset() + sum(map(operator.mul, off, strides)))


def global_scale(amax: Tensor) -> Tensor:
    """amax, float32 -> global scale, float32 of the same shape; infinite where the amax is not finite."""
    least = ((amax.view(torch.int32) + _ABOVE_1728) >> 23) - 10
    above = ((least - _USUAL + (1 << _STEP) - 1) >> _STEP << _STEP) + _USUAL
    field = torch.maximum(above, (least + _WITHIN).clamp_(max=_USUAL)).clamp_(min=_LEAST)
    # with a number, `where` would copy it to the device and wait
    field = field.masked_fill_(amax == 0, _USUAL).masked_fill_(~torch.isfinite(amax), 255)
    return (field << 23).view(torch.float32)


# -- quantizing -------------------------------------------------------------------------------------------------------


def quantize_into(
    out: Packed, weight: Tensor, scale: Tensor, *, search: bool = True, scratch: Tensor | None = None
) -> None:
    """Write numbers and scales of a box of whole groups.

    Args:
        weight: bf16, fp16 or fp32 [..., out, in]; any strides.
        scale: the global scale of each matrix, float32 [..., 1, 1].
        search: whether the scale of a group is the best of four, or the first.
        scratch: float32, any number of elements: as much is done at a time as fits.
    """
    kernel = _kernel(weight.device) if weight.is_cuda else None
    if kernel is not None:
        kernel.quantize_into(*out, weight, scale, _errors(weight.device), search=search)
        return
    lead = weight.shape[:-2]
    scale = scale.expand(*lead, 1, 1) if lead else scale.view(1, 1)
    for off, size in _steps(tuple(weight.shape), _at_once(weight, scratch)):
        part, mine = weight, scale
        for axis, (start, n) in enumerate(zip(off, size, strict=True)):
            part = part.narrow(axis, start, n)
            mine = mine.narrow(axis, start, n) if axis < len(lead) else mine
        _quantize(out.box(off, size), part, mine, _memory(scratch, part), search)


@functools.cache
def _kernel(device: torch.device) -> Any:
    """`nvfp4_kernel`, or None where Triton does not compile for a GPU: it is tried, before a load's first stream."""
    if not compiling.may(device):
        return None

    def attempt() -> Any:
        from . import nvfp4_kernel

        weight = torch.zeros((1, GROUP), dtype=torch.bfloat16, device=device)
        out = Packed.of(torch.empty((1, _BYTES), dtype=torch.uint8, device=device))
        nvfp4_kernel.quantize_into(*out, weight, global_scale(weight.float()[:, :1]), _errors(device), search=True)
        return nvfp4_kernel

    return compiling.tried(attempt, "weights become nvfp4 by torch's operations")


def _at_once(weight: Tensor, scratch: Tensor | None) -> int:
    """How many elements to quantize at a time."""
    fits = (1 << 62) if scratch is None else scratch.numel() // _SCRATCH
    if weight.device.type == "cpu":
        return min(_AT_ONCE, fits)
    return _AT_ONCE_ON_DEVICE if scratch is None else fits


@functools.lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], limit: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Offsets and sizes of boxes of at most so many elements, or of one group of columns, that cover a box."""
    if not math.prod(shape):
        return ()
    steps: list[int] = []
    left = max(1, limit // GROUP)
    for n in (shape[-1] // GROUP, *reversed(shape[:-1])):
        steps.insert(0, min(n, left))
        left = max(1, left // n)
    steps[-1] *= GROUP
    ranges = [range(0, n, step) for n, step in zip(shape, steps, strict=True)]
    return tuple(
        (off, tuple(min(step, n - at) for at, step, n in zip(off, steps, shape, strict=True)))
        for off in itertools.product(*ranges)
    )


def _memory(scratch: Tensor | None, part: Tensor) -> Tensor:
    """Tensors [16, groups], one after another."""
    needed = _SCRATCH * part.numel()
    if scratch is None or scratch.numel() < needed:
        scratch = torch.empty(needed, dtype=torch.float32, device=part.device)
    return scratch[:needed].view(_SCRATCH, GROUP, -1)


def _quantize(out: Packed, weight: Tensor, scale: Tensor, memory: Tensor, search: bool) -> None:
    """Quantize a box, in memory where the 16 weights of a group lie far apart, and those of all groups together."""
    groups = (*weight.shape[:-1], weight.shape[-1] // GROUP)
    wide, other, index = memory[0], memory[1], memory[2]
    wide.view(GROUP, *groups).copy_(weight.view(*groups, GROUP).movedim(-1, 0))
    magnitude = torch.abs(wide, out=other)
    scale = scale.view(1) if scale.numel() == 1 else scale.expand(groups).reshape(-1)
    bits = _first_scale(magnitude.amax(0) / scale)
    if search:
        bits = _best_scale(magnitude, bits, scale, memory[2:])
    bits = torch.minimum(bits, _largest_scale(scale))
    out.scales.view(torch.uint8).copy_(bits.view(groups))
    quarters = wide.div_(bits.view(E4M3).float().mul_(scale).mul_(0.25))
    twice = torch.ceil(quarters, out=other).add_(quarters.floor_())
    pairs = torch.add(twice[0::2], twice[1::2], alpha=2 * _SIDE, out=quarters[: GROUP // 2]).add_(
        _SIDE * (2 * _SIDE + 1)
    )
    at = index[: GROUP // 2].view(torch.int32).copy_(pairs).clamp_(0, 4 * _SIDE * _SIDE - 1)
    codes = torch.index_select(_pair_codes(weight.device), 0, at.view(-1))
    out.codes.view(*groups, GROUP // 2).copy_(codes.view(GROUP // 2, *groups).movedim(0, -1))


def _first_scale(amax: Tensor) -> Tensor:
    """amax of groups by global scale -> the bits of their first scales."""
    bits = (amax / constant(6.0, amax.device)).to(E4M3).view(torch.uint8).clamp_(min=1)
    return bits.masked_fill_(amax == 0, _ONE)


def _largest_scale(scale: Tensor) -> Tensor:
    """Global scales -> the bits of the largest scales, whose 6 is still finite."""
    return (scale < 2.0**120).to(torch.uint8).mul_(0x7F - _FORTY).add_(_FORTY)


def _best_scale(magnitude: Tensor, first: Tensor, scale: Tensor, memory: Tensor) -> Tensor:
    """Magnitudes [16, groups], their first scales, global scales -> the bits of the best scales."""
    code = first.int()
    step = first.view(E4M3).float().mul_(scale).reciprocal_().mul_(_PARTS)
    row = torch.where(code < 8, code, (code & 7) + 8) * _ROW
    at = memory[0].view(torch.int32).copy_(torch.mul(magnitude, step, out=memory[1]))
    at.add_(row).clamp_(0, 16 * _ROW - 1)
    errors = memory[1:3].view(-1).view(torch.int64)
    torch.index_select(_errors(code.device), 0, at.view(-1), out=errors)
    total = errors.view(GROUP, -1).sum(0)
    # of each sum, times four, the number of its scale: so the least of four tells which it is, and of equals the first
    even = (total & _EVEN).bitwise_left_shift_(2).add_(2 << 32)
    odd = (total >> 16).bitwise_and_(_EVEN).bitwise_left_shift_(2).add_((3 << 32) + 1)
    least = torch.minimum(even.view(torch.int32), odd.view(torch.int32)).view(-1, 2)
    number = torch.minimum(least[:, 0], least[:, 1]).bitwise_and_(3)
    return code.add_(number).add_(number.bitwise_and_(2)).to(torch.uint8)  # 0, 1, 4 or 5 further on


def warm_up(device: torch.device) -> None:
    """Make the constants of a device, on the current stream of it."""
    constant(6.0, device)
    pairs(VALUES, device)
    for table in (_errors, _pair_codes):
        table(device)


@functools.cache
@in_memory
def _errors(device: torch.device) -> Tensor:
    """The squared errors of a weight under all scales that are tried, 16 bits each."""
    code = torch.arange(16, dtype=torch.int64).view(16, 1)  # 1 to 7, and 8 to 15 for all larger ones
    weight = (2 * torch.arange(_ROW, dtype=torch.int64) + 1) * code  # in 56ths
    values = torch.tensor([int(2 * value) for value in VALUES[:8]], dtype=torch.int64)
    found = torch.zeros((16, _ROW), dtype=torch.int64)
    for number, further in enumerate(_TRIED):
        scale = torch.where(code + further < 16, code + further, 2 * (code + further - 8))
        distance = (weight.unsqueeze(-1) - _PARTS * scale.unsqueeze(-1) * values).abs().amin(-1)
        whole = (2 * _PARTS * code).square().clamp(min=1)
        error = (2 * _UNIT * distance.square() + whole) // (2 * whole)
        found |= error.clamp(max=_MOST) << 16 * number
    return found.view(-1).to(device)


@functools.cache
@in_memory
def _pair_codes(device: torch.device) -> Tensor:
    """floor(q) + ceil(q) of two weights, q being four times one by its scale -> their two numbers in a byte."""
    twice = torch.arange(-_SIDE, _SIDE)
    bounds = torch.tensor([2, 6, 10, 14, 20, 28, 40])  # twice of four times what lies between two numbers
    up = torch.tensor([False, True, False, True, False, True, False])  # the even one of the two
    size = twice.abs().unsqueeze(1)
    code = ((size > bounds) | ((size == bounds) & up)).sum(1) | (twice < 0) * 8
    return (code.unsqueeze(0) | code.unsqueeze(1) << 4).view(-1).to(torch.uint8).to(device)


# -- reading ----------------------------------------------------------------------------------------------------------


def widen(stored: Packed, out: Tensor | None = None) -> Tensor:
    """Numbers by scales, without the global scale: float32 [..., out, in], exact."""
    codes, scales = stored
    shape = (*scales.shape, GROUP)
    wide = torch.empty(shape, dtype=torch.float32, device=codes.device) if out is None else out.view(shape)
    flat = codes.reshape(-1).int()
    torch.index_select(pairs(VALUES, codes.device), 0, flat, out=wide.view(-1).view(torch.int64))
    return wide.mul_(scales.float().unsqueeze(-1)).view(stored.shape)
