"""Triton kernels of the forward on a GPU: a product with FP8, int8 or NVFP4 weights.

Imported only where Triton is installed. Every kernel takes every scheme and any side; matrices are contiguous along
their rows. `fp8` holds the reasons for which kernel runs when.

Compiled at first use, about a second for each kernel and tile, and kept on disk by Triton (``~/.triton/cache``).
What experts need beside their product is in `expert_kernels`, what makes activations FP8 in `activation_kernels`, what
widens weights in `widening_kernels`; all are handed on from here.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation_kernels import Groups, Rows, each_row, groups
from .activation_kernels import quantize_groups as quantize_groups
from .activation_kernels import quantize_rows as quantize_rows
from .expert_kernels import combine as combine
from .expert_kernels import sort_routes as sort_routes
from .launching import Launch, power_of_two
from .widening_kernels import unpacked, widened
from .widening_kernels import widen as widen

DENSE, PAIRS, SORTED = 0, 1, 2


class Tile(NamedTuple):
    """The part of a product that one program computes: ``rows`` x ``cols``, in steps of ``depth``."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Shape of a weight [..., rows, cols], and which of its scales each row takes. Compared by identity."""

    rows: int
    cols: int
    cells: tuple[int, int]  # scales of one matrix
    group_rows: int
    group_cols: int  # 0: one scale a row
    power_of_two: bool
    parts: int
    starts: tuple[int, int, int]  # rows at which parts 2, 3, 4 begin
    firsts: tuple[int, int, int]  # their first cells
    pitch: int  # bytes of a row
    packed: bool  # as NVFP4 is stored


class Routes(NamedTuple):
    """Which expert each row of a product goes to."""

    top_k: int  # rows of the output for each row of x
    ids: Tensor  # [rows]: the expert of each row of the output
    order: Tensor | None = None  # [rows]: the rows sorted by expert, if they are; ids are then sorted, too
    ends: Tensor | None = None  # int32 [experts]: where in order each expert's rows end
    gather: bool = False  # row i takes x[order[i] // top_k]; else x is sorted as the output is


@triton.jit
def _scale_cell(col, part_1, part_2, part_3, cell_1, cell_2, cell_3, GROUP_ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Weight row -> row of its scale grid. Parts 2, 3 and 4 begin at rows part_i and cells cell_i."""
    if PARTS == 1:
        cell = col // GROUP_ROWS
    else:
        begin = tl.where(col >= part_3, part_3, tl.where(col >= part_2, part_2, tl.where(col >= part_1, part_1, 0)))
        cell = tl.where(col >= part_3, cell_3, tl.where(col >= part_2, cell_2, tl.where(col >= part_1, cell_1, 0)))
        cell += (col - begin) // GROUP_ROWS
    return cell


@triton.jit(
    do_not_specialize=[
        "m",
        "x_scale_stride",
        "part_1",
        "part_2",
        "part_3",
        "cell_1",
        "cell_2",
        "cell_3",
        "top_k",
        "experts",
    ]
)
def _product_kernel(
    x, x_scale, q, scale, bias, out, ids, order, ends,  # tensors; the last three of experts
    m, n, k, pitch, x_scale_stride, cells_n, cells_k,
    part_1, part_2, part_3, cell_1, cell_2, cell_3, top_k, experts,
    MODE: tl.constexpr, GATHER: tl.constexpr, FP8_X: tl.constexpr, MX: tl.constexpr,
    FOLD: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLS: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, EVEN: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x[m, k] @ (q * scale)[n, k].T + bias.

    The tile is computed transposed, weights on the left: tensor cores take 64 rows from there, and 8 or more from the
    right, so that few tokens waste little; and converted weights stay in registers.
    """
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(n, BN)
    if MODE == 0:  # DENSE: eight row tiles beside each other share weights in the L2 cache
        tiles_m = tl.cdiv(m, BM)
        band = 8 * tiles_n
        first = pid // band * 8
        height = tl.minimum(tiles_m - first, 8)
        tile_m = first + pid % band % height
        tile_n = pid % band // height
        rows = tile_m * BM + tl.arange(0, BM)
        limit = m
        x_rows = rows
    elif MODE == 1:  # PAIRS: one row of activations a tile, whose expert is in ids
        tile_n = pid % tiles_n
        pair = pid // tiles_n
        expert = tl.load(ids + pair)
        if expert >= experts:
            return  # another rank's
        rows = pair + tl.arange(0, BM)
        limit = pair + 1
        x_rows = rows // top_k
    else:  # SORTED: rows of one expert beside each other, tiles never shared by two
        tile = pid // tiles_n
        tile_n = pid % tiles_n
        each = tl.arange(0, EXPERTS)
        stops = tl.load(ends + each, mask=each < experts, other=0)
        starts = tl.load(ends + each - 1, mask=(each > 0) & (each < experts), other=0)
        tiles = tl.where(each < experts, (stops - starts + BM - 1) // BM, 0)
        through = tl.cumsum(tiles, 0)
        expert = tl.sum(tl.where(through <= tile, 1, 0), 0)
        if expert >= experts:
            return
        here = each == expert
        start = tl.sum(tl.where(here, starts + (tile - through + tiles) * BM, 0), 0)
        limit = tl.sum(tl.where(here, stops, 0), 0)
        rows = start + tl.arange(0, BM)
        x_rows = rows
        if GATHER:
            x_rows = tl.load(order + rows, mask=rows < limit, other=0).to(tl.int32) // top_k
    if MODE != 0:
        expert = expert.to(tl.int64)
        q += expert * n * pitch
        scale += expert * cells_n * cells_k
        if HAS_BIAS:
            bias += expert * n

    cols = tile_n * BN + tl.arange(0, BN)
    in_rows, in_cols = rows < limit, cols < n
    cell = _scale_cell(cols, part_1, part_2, part_3, cell_1, cell_2, cell_3, GROUP_ROWS, PARTS)
    scale_at = scale + cell * cells_k
    if PACKED:  # two columns beside each other are in one byte: even ones and odd ones are multiplied apart
        depth = tl.arange(0, BK // 2)
        x_at = x.to(tl.pointer_type(tl.int32))
        x_at += tl.multiple_of(x_rows.to(tl.int64) * (k // 2), 8)[None, :] + depth[:, None]
        q_at = q + tl.multiple_of(cols.to(tl.int64) * pitch, ALIGN)[:, None]
        group = tl.arange(0, BK // 16)
        group_at = q_at + (k // 2 + group)[None, :]
        q_at += depth[None, :]
        scales = tl.load(group_at, mask=in_cols[:, None] & (group < k // 16)[None, :], other=0)
    else:
        depth = tl.arange(0, BK)
        x_at = x + x_rows.to(tl.int64)[None, :] * k + depth[:, None]
        q_at = q + cols.to(tl.int64)[:, None] * pitch + depth[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    if GROUP_COLS != 0 and not FOLD:  # factors are loaded a step ahead of their use
        factor = tl.load(scale_at, mask=in_cols, other=0)
        if FP8_X and not MX:
            x_scale += x_rows
            x_factor = tl.load(x_scale, mask=in_rows, other=0)
    for start_k in range(0, k, BK):
        if EVEN:
            values = tl.load(x_at, mask=in_rows[None, :], other=0.0)
            weight = tl.load(q_at, mask=in_cols[:, None], other=0.0)
        else:
            within = depth < (k - start_k) // (2 if PACKED else 1)
            values = tl.load(x_at, mask=in_rows[None, :] & within[:, None], other=0.0)
            weight = tl.load(q_at, mask=in_cols[:, None] & within[None, :], other=0.0)
        if PACKED:
            group_at += BK // 16  # scales, too, are loaded a step ahead
            beyond = group < (k - start_k - BK) // 16
            scales_following = tl.load(group_at, mask=in_cols[:, None] & beyond[None, :], other=0)
            low, high = unpacked(weight, scales, out.dtype.element_ty)
            even = values.to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            odd = (values >> 16).to(tl.int16).to(out.dtype.element_ty, bitcast=True)
            acc = tl.dot(low, even, acc)
            acc = tl.dot(high, odd, acc)
            scales = scales_following
        elif not FP8_X:
            weight = widened(weight, values.dtype)
        if PACKED:
            pass
        elif GROUP_COLS == 0:
            acc = tl.dot(weight, values, acc)
        elif FOLD:  # powers of two: exact in bf16
            group = start_k // GROUP_COLS + tl.arange(0, BK // GROUP_COLS)
            factors = tl.load(scale_at[:, None] + group[None, :], mask=in_cols[:, None] & (group < cells_k)[None, :])
            factors = tl.where(factors == 0, 0x40, factors.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True)
            weight = tl.reshape(weight, (BN, BK // GROUP_COLS, GROUP_COLS)) * factors[:, :, None]
            acc = tl.dot(tl.reshape(weight, (BN, BK)), values, acc)
        else:
            more = start_k + BK < k
            scale_at += 1
            following = tl.load(scale_at, mask=in_cols & more, other=0)
            part = tl.dot(weight, values)
            if MX:
                factor = tl.where(factor == 0, 0x400000, factor.to(tl.int32) << 23).to(tl.float32, bitcast=True)
            if FP8_X and not MX:
                x_scale += x_scale_stride
                x_following = tl.load(x_scale, mask=in_rows & more, other=0)
                part *= x_factor[None, :]
                x_factor = x_following
            acc += part * factor[:, None]
            factor = following
        x_at += BK // 2 if PACKED else BK
        q_at += BK // 2 if PACKED else BK
    if PACKED:
        acc *= 256.0
    if GROUP_COLS == 0:
        acc *= tl.load(scale_at, mask=in_cols, other=0)[:, None]
    if FP8_X and (GROUP_COLS == 0 or MX):
        acc *= tl.load(x_scale + x_rows, mask=in_rows, other=0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=in_cols, other=0).to(tl.float32)[:, None]
    out_at = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out_at, tl.trans(acc).to(out.dtype.element_ty), mask=in_rows[:, None] & in_cols[None, :])


# -- launching --------------------------------------------------------------------------------------------------------


def product(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    layout: Layout,
    tile: Tile,
    out: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    routes: Routes | None = None,
) -> Tensor:
    """``x @ dequantize(q).T + bias`` into ``out``, of experts if ``routes`` are given.

    Args:
        x: bf16 or fp16 [..., in], or float8_e4m3fn with ``x_scale``; contiguous, and for NVFP4 at an even place.
        q: float8_e4m3fn, int8 or as NVFP4 is stored [out, in], or [experts, out, in].
        scale: as stored; the bytes of mxfp8's.
        x_scale: float32 [rows, 1], or [ceil(in / 128), at least rows] under fp8_block.
        bias: [out], or [experts, out].
        out: [..., out]; rows are those of x or those of ``routes``.
    """
    ids = order = ends = routed = None
    if routes is not None:
        top_k, ids, order, ends, gather = routes
        indices = ids.dtype if order is None else order.dtype
        routed = _Routed(top_k, q.shape[0], order is not None, gather and order is not None, indices)
    x = at_even_place(x) if layout.packed else x
    rows, dtypes = out.numel() // layout.rows, (x.dtype, out.dtype, None if bias is None else bias.dtype)
    launch = _product_launch(layout, tile, rows, 0 if x_scale is None else x_scale.shape[-1], dtypes, routed)
    launch(x, x_scale, q, scale, bias, out, ids, order, ends)
    return out


def at_even_place(x: Tensor) -> Tensor:
    """Activations of half precision at a multiple of four bytes: two of them are loaded at once beside NVFP4."""
    return x.clone() if x.data_ptr() % 4 else x


class _Routed(NamedTuple):
    """What of `Routes` is no tensor."""

    top_k: int
    experts: int
    sorted: bool
    gather: bool
    indices: torch.dtype


@functools.lru_cache(maxsize=4096)
def _product_launch(
    layout: Layout, tile: Tile, rows: int, x_scale_stride: int, dtypes: tuple[Any, ...], routed: _Routed | None
) -> Launch:
    """A product of so many rows.

    Args:
        x_scale_stride: 0 without scales.
        dtypes: of x, of the result, and of the bias.
    """
    n, k = layout.rows, layout.cols
    tiles_n, tiles_m = -(-n // tile.cols), -(-rows // tile.rows)
    fold = layout.power_of_two and dtypes[0] == torch.bfloat16
    depth = tile.depth if fold or not layout.group_cols else layout.group_cols
    mode, count, top_k, experts, gather = DENSE, 0, 1, 1, False
    if routed is not None:
        top_k, experts, gather = routed.top_k, routed.experts, routed.gather
        if routed.sorted:
            mode, count = SORTED, power_of_two(experts)
            tiles_m += min(experts, rows)  # at most: an expert's last tile may be partly empty
        else:
            mode, tiles_m = PAIRS, rows
    scaled = x_scale_stride > 0
    return Launch(
        _product_kernel,
        (tiles_n * tiles_m, 1, 1),
        (layout, tile, dtypes, scaled, mode, gather, count, routed and routed.indices),
        (rows, n, k, layout.pitch, x_scale_stride, *layout.cells, *layout.starts, *layout.firsts,
         top_k, experts, mode, gather, scaled, layout.power_of_two, fold,
         layout.group_rows, layout.group_cols, layout.parts, dtypes[2] is not None, count, k % depth == 0,
         layout.packed, math.gcd(layout.pitch, 16), tile.rows, tile.cols, depth),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip


class Dense:
    """A product with a weight of a linear layer for so many rows, all of it decided: see `product`.

    Args:
        activations: the scheme of the weight, if its product is of FP8 activations.
    """

    __slots__ = ("_launch", "_packed", "_quantize", "_rows")

    def __init__(
        self,
        layout: Layout,
        tile: Tile,
        rows: int,
        dtype: torch.dtype,
        bias: torch.dtype | None,
        activations: str | None,
    ) -> None:
        self._rows, k, x_scale_stride, x_dtype = layout.rows, layout.cols, 0, dtype
        self._packed = layout.packed
        self._quantize: Rows | Groups | None = None
        if activations is not None:
            self._quantize = groups(rows, k, dtype) if activations == "fp8_block" else each_row(rows, k, dtype)
            x_scale_stride, x_dtype = self._quantize.stride, torch.float8_e4m3fn
        self._launch = _product_launch(layout, tile, rows, x_scale_stride, (x_dtype, dtype, bias), None)

    def __call__(self, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(*x.shape[:-1], self._rows, dtype=x.dtype, device=x.device)
        x_scale = None
        if self._quantize is not None:
            x, x_scale = self._quantize(x)
        elif self._packed:
            x = at_even_place(x)
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        self._launch(x, x_scale, q, scale, bias, out, None, None, None)
        return out
