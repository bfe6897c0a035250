"""Triton kernels around the products of experts: which rows go to which expert, and the sum of what they return.

Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch


@triton.jit(do_not_specialize=["top_k", "experts"])
def _combine_kernel(y, ids, weights, position, out, n, top_k, experts, SORTED: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum over j of weights[t, j] * y[t * top_k + j], in float32, without experts of other ranks."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(top_k):
        pair = token * top_k + j
        row = pair
        if SORTED:
            row = tl.load(position + pair).to(tl.int64)
        mine = tl.load(ids + pair) < experts
        weight = tl.load(weights + pair).to(tl.float32)
        acc += weight * tl.load(y + row * n + col, mask=mine & (col < n), other=0.0).to(tl.float32)
    tl.store(out + token * n + col, acc.to(out.dtype.element_ty), mask=col < n)


@triton.jit(do_not_specialize=["rows", "experts"])
def _sort_kernel(ids, sorted_ids, order, position, ends, rows, experts, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sort rows by expert: each is compared with all others. The last programs count, for `ends`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.cdiv(rows, BLOCK)
    if tl.program_id(0) < blocks:
        mine = tl.load(ids + at, mask=at < rows, other=0)
        rank = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, rows, STEP, num_stages=3):
            other_at = start + tl.arange(0, STEP)
            other = tl.load(ids + other_at, mask=other_at < rows, other=0)
            before = (other[None, :] < mine[:, None]) | (
                (other[None, :] == mine[:, None]) & (other_at[None, :] < at[:, None])
            )
            rank += tl.sum((before & (other_at < rows)[None, :]).to(tl.int32), 1)
        tl.store(sorted_ids + rank, mine, mask=at < rows)
        tl.store(order + rank, at, mask=at < rows)
        tl.store(position + at, rank, mask=at < rows)
    else:
        expert = at - blocks * BLOCK
        count = tl.zeros((BLOCK,), tl.int32)
        for start in tl.range(0, rows, STEP, num_stages=3):
            other_at = start + tl.arange(0, STEP)
            other = tl.load(ids + other_at, mask=other_at < rows, other=0)
            through = (other[None, :] <= expert[:, None]) & (other_at < rows)[None, :]
            count += tl.sum(through.to(tl.int32), 1)
        tl.store(ends + expert, count, mask=expert < experts)


def sort_routes(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fp8.sort_routes`, in one kernel, whose work grows with the square of the rows. int32, but for sorted ids."""
    rows = len(ids)
    sorted_ids = torch.empty_like(ids)
    # not halves of one: an operation's results may not share memory under torch.compile
    order, position = (torch.empty(rows, dtype=torch.int32, device=ids.device) for _ in range(2))
    ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
    _sort_launch(rows, experts, ids.dtype)(ids, sorted_ids, order, position, ends)
    return sorted_ids, order, ends, position


@functools.lru_cache(maxsize=4096)
def _sort_launch(rows: int, experts: int, dtype: torch.dtype) -> Launch:
    blocks = -(-rows // 32) + -(-experts // 32)
    return Launch(_sort_kernel, (blocks, 1, 1), (dtype,), (rows, experts, 32, 256), num_warps=4)


def combine(y: Tensor, ids: Tensor, weights: Tensor, experts: int, position: Tensor | None = None) -> Tensor:
    """y [tokens * k, n], weights and ids [tokens, k] -> [tokens, n]: the weighted sum over k, where ids < experts.

    Row t * k + j of y belongs to ids[t, j], or row position[t * k + j].
    """
    tokens, top_k = ids.shape
    n = y.shape[1]
    out = torch.empty(tokens, n, dtype=y.dtype, device=y.device)
    dtypes = (y.dtype, ids.dtype, weights.dtype, None if position is None else position.dtype)
    _combine_launch(tokens, n, top_k, experts, dtypes)(y, ids, weights, position, out)
    return out


@functools.lru_cache(maxsize=4096)
def _combine_launch(tokens: int, n: int, top_k: int, experts: int, dtypes: tuple[torch.dtype | None, ...]) -> Launch:
    grid = (tokens, -(-n // 1024), 1)
    return Launch(_combine_kernel, grid, (n, dtypes), (n, top_k, experts, dtypes[3] is not None, 1024), num_warps=4)
