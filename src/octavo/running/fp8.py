"""Products on a GPU with FP8 units (NVIDIA, compute capability 8.9 and later), for bf16 and fp16 activations.

    rows of x        fp8_channel, fp8_tensor         fp8_block                         mxfp8, int8_channel, nvfp4
    up to 16         weight-only, one kernel         the same                          the same
    more             FP8 activations, one kernel     FP8 activations, the library      the same, to 64 or 256 (int8)
    513 and more     FP8 activations, the library    the same                          widened, then F.linear

    experts:
    fewer than 2 rows an expert   weight-only, one kernel        the same              the same
    more                          FP8 activations, one kernel    the same              weight-only, one kernel

int8 and nvfp4 need no FP8 units: they are computed so from compute capability 8.0 on.

*Weight-only*: weights are widened exactly, the product is computed in the dtype of the activations and scaled in
float32; for mxfp8 in bf16, the power of two is folded into the weight, exactly, and so is the scale of 16 columns for
nvfp4. Where weights are *widened* first, they
are scaled and rounded to that dtype, too.

*FP8 activations* are quantized when they come, with a scale of amax / 448 for each row, or for 128 columns of a row
where the weight's scales vary along it (blocks). Rounding to e4m3 moves each by at most 1/16 of itself, or, if it is
below 2**-6 of its scale, by 2**-10 of it: ``|y - y_ref| <= (1/16 + 2**-13) * |x| @ |w|.T + 2**-10 * x_scale * sum|w|``,
and what F.linear would lose. The 2**-13 is for sums that tensor cores keep in fewer bits than float32
(``use_fast_accum``). For normally distributed activations, the relative error of y (Frobenius) is 0.026.

What the library, torch's own ``scaled_mm``, doesn't take (sides that are no multiple of 16; of blocks, other GPUs than
Hopper and parts that end within one) goes through the kernels of `kernels`. Without Triton, torch's operations
quantize, and what the library doesn't take is weight-only. mxfp8 on Blackwell would need its scales swizzled; it is
weight-only, too.

F.scaled_grouped_mm is not used: it takes scales a row in bf16, and was at best as fast as the kernel here
(226 and 228 µs for the products of Qwen1.5-MoE at 1024 tokens, 913 and 656 at 8192).

On meta the functions compute nothing, but note which kernels they would launch (`ahead`).

No function here waits for the GPU or makes a shape of what lies there, so all can be captured in CUDA graphs. Under
torch.compile each is one opaque operation (``torch.ops.octavo``), and branches on the number of rows are taken at
run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import schemes
from ..numerics.scale_grid import ScaleGrid
from . import gradients, library
from .available import HAS_TRITON, kernels
from .library import quantize_groups, quantize_rows
from .opaque import opaque

if TYPE_CHECKING:
    from . import kernels as _kernels_module

#: of activations
DTYPES = frozenset({torch.bfloat16, torch.float16})
_MAX_PARTS = 4

# All measured on an H100, for weights of 4096 x 4096 and 14336 x 4096, and experts of Qwen1.5-MoE.
#: up to so many rows a product is weight-only, in one kernel
_FEW = 16
#: schemes whose activations are never quantized, and up to how many rows a product is one kernel; for more, weights
#: are widened
_WEIGHT_ONLY = {"mxfp8": 64, "int8_channel": 256, "nvfp4": 64}
#: bytes of weights that are widened at a time
_WIDENED = 64 << 20
#: from so many rows on a product is the library's; before, that takes the host longer, and the GPU no less
_MANY = 513
#: the same under fp8_block
_MANY_BLOCK = 17
#: up to so many (token, expert) pairs are not sorted: each is a tile
_PAIRS = 32
#: up to so many pairs are sorted by comparing each with all
_SORTED_AT_ONCE = 8192
#: from so many rows an expert on, activations are FP8
_BUSY = 2


def computes(dtype: torch.dtype, index: int) -> bool:
    """Return True if CUDA device ``index`` multiplies weights of such numbers here."""
    if dtype in (torch.int8, torch.uint8):
        return HAS_TRITON and torch.version.cuda is not None and _capability(index) >= (8, 0)
    return dtype == schemes.FP8 and has_units(index)


def has_units(index: int) -> bool:
    """Return True if CUDA device ``index`` has FP8 units."""
    return torch.version.cuda is not None and _capability(index) >= (8, 9)


def _capability(index: int) -> tuple[int, int]:
    """Of a device, or for -1 (that of a tensor on meta) of the current one."""
    if torch.compiler.is_compiling():  # which takes this for a constant, and looks through no cache
        properties = torch.cuda.get_device_properties(index)
        return properties.major, properties.minor
    return _capability_cached(index)


@functools.cache
def _capability_cached(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index if index >= 0 else None)


def has_kernels() -> bool:
    """Return True if there are the kernels that Triton compiles."""
    return kernels() is not None


def takes(x: Tensor, q: Tensor, *others: Tensor | None) -> bool:
    """Return True if the functions here take these operands: a GPU for it, half precision, no gradient asked."""
    if x.dtype not in DTYPES or not q.is_cuda or not computes(q.dtype, q.device.index):
        return False
    return not gradients.are_asked(x, *others)


# -- layouts and tiles ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _layout(rows: int, cols: int, name: str, parts: tuple[int, ...]) -> _kernels_module.Layout:
    scheme = schemes.get(name)
    grid = ScaleGrid((rows, cols), scheme, (rows,) if scheme.group_rows == 1 else parts)
    others = grid.each_part[1:]
    starts, firsts = [*(part.start for part in others), rows, rows, rows], [*(p.first_cell for p in others), 0, 0, 0]
    cell_rows, cell_cols = grid.grid_shape
    return kernels().Layout(  # type: ignore[no-any-return]
        rows=rows,
        cols=cols,
        cells=(cell_rows, cell_cols),
        group_rows=scheme.group_rows or 1 << 30,
        group_cols=scheme.group_cols or 0,
        power_of_two=scheme.power_of_two,
        pitch=scheme.stored_shape((rows, cols))[1],
        packed=scheme.packed,
        parts=len(grid.parts),
        starts=(starts[0], starts[1], starts[2]),
        firsts=(firsts[0], firsts[1], firsts[2]),
    )


@functools.lru_cache(maxsize=4096)
def _tile(device: int, rows: int, cols: int, scheme: str, wide: bool, experts: bool) -> _kernels_module.Tile:
    """Part of a product of ``rows`` rows (of an expert) with ``cols`` columns, on a device; -1: the current one.

    Args:
        wide: weights are widened to half precision.
    """
    tile = kernels().Tile
    properties = torch.cuda.get_device_properties(device if device >= 0 else None)

    def count(height: int, width: int) -> int:
        return -(-rows // height) * -(-cols // width)

    at_once = properties.multi_processor_count
    if scheme == "int8_channel":
        found = tile(*_int8_tile(rows, experts, lambda *sides: count(*sides) >= at_once * 0.8))
    elif wide:
        if rows <= 16 and not experts:
            found = tile(16, 32, 128, 4, 6) if scheme == "mxfp8" else tile(16, 32, 256, 4, 4)
        elif rows <= 8:
            found = tile(16, 64, 128, 4, 5)
        elif rows <= 16:
            found = tile(32, 64, 128, 4, 5)
        else:
            found = tile(64, 64, 128, 4, 4)
    elif experts or scheme == "fp8_block":
        if rows <= 32:
            found = tile(32, 64, 128, 4, 5)
        elif scheme == "fp8_block" or rows <= 64:
            found = tile(64, 128, 128, 4, 4) if experts or rows > 128 else tile(64, 64, 128, 4, 5)
        else:
            found = tile(128, 128, 128, 4, 3)
    elif rows <= 32 or count(32, 64) <= 2 * at_once:
        found = tile(32, 64, 256, 4, 4)
    elif rows > 128 and count(128, 128) >= at_once:
        found = tile(128, 128, 128, 4, 3)
    elif rows > 64 and count(128, 64) >= at_once:
        found = tile(128, 64, 128, 4, 4)
    else:
        found = tile(64, 64, 128, 4, 5)
    shared: int = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    stage = (found.rows * (2 if wide else 1) + found.cols) * found.depth
    return found._replace(stages=max(1, min(found.stages, shared // stage - 1)))  # type: ignore[no-any-return]


def _int8_tile(rows: int, experts: bool, is_busy: Callable[[int, int], bool]) -> tuple[int, int, int, int, int]:
    """Rows, columns, depth, warps and stages; of the larger tiles one that keeps the processors of a GPU busy."""
    if experts:
        if rows <= 8:
            return 16, 32, 128, 4, 4
        return (32, 64, 128, 4, 3) if rows <= 32 else (128, 64, 64, 4, 3)
    if rows <= 32:
        return (16, 32, 256, 4, 4) if rows <= 16 else (32, 32, 256, 4, 4)
    if rows > 128 and is_busy(256, 128):
        return 256, 128, 64, 8, 4
    if rows > 64 and is_busy(128, 128):
        return 128, 128, 64, 8, 4
    return (128, 64, 128, 4, 4) if rows > 64 and is_busy(128, 64) else (64, 64, 128, 4, 4)


def _bytes(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8) if scale.dtype == schemes.E8M0 else scale


# -- linear layers ----------------------------------------------------------------------------------------------------


@opaque(
    "(Tensor x, Tensor q, Tensor scale, str scheme, SymInt[] parts, Tensor? bias) -> Tensor",
    lambda x, q, *_: x.new_empty(*x.shape[:-1], q.shape[0]),
)
def linear(x: Tensor, q: Tensor, scale: Tensor, scheme: str, parts: Sequence[int], bias: Tensor | None) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias``, in x's dtype."""
    n, k = len(q), x.shape[-1]
    rows = x.numel() // k
    if not rows or not n:
        return x.new_zeros(*x.shape[:-1], n)
    bias_dtype = None if bias is None else bias.dtype
    way = _way(n, k, rows, scheme, tuple(parts), x.dtype, bias_dtype, x.get_device())
    return way(x.contiguous(), q, scale, bias)


#: x, the weight, its scale, a bias -> the product
_Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@functools.lru_cache(maxsize=4096)
def _way(
    n: int,
    k: int,
    rows: int,
    scheme: str,
    parts: tuple[int, ...],
    dtype: torch.dtype,
    bias: torch.dtype | None,
    device: int,
) -> _Way:
    """How a product is computed: all that can be decided without its tensors, since deciding costs the host, too."""
    by_block = scheme == "fp8_block"
    if rows >= (_MANY_BLOCK if by_block else _MANY) and library.takes(
        (n, k), scheme, parts, dtype, _capability(device)
    ):
        return functools.partial(library.product, by_block=by_block, parts=parts)
    if not has_kernels() or len(parts) > _MAX_PARTS:
        return functools.partial(_weight_only, scheme=scheme, parts=parts)
    if rows > _WEIGHT_ONLY.get(scheme, rows):
        return functools.partial(_widened_linear, parts=parts)
    wide = scheme in _WEIGHT_ONLY or rows <= _FEW
    layout, tile = _layout(n, k, scheme, parts), _tile(device, rows, n, scheme, wide, False)
    return kernels().Dense(layout, tile, rows, dtype, bias, activations=None if wide else scheme)  # type: ignore[no-any-return]


def _widened_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, *, parts: tuple[int, ...]) -> Tensor:
    """At most 128 MiB of the weight widened at a time."""
    n, k = len(q), x.shape[-1]
    scale = library.row_of_scales(scale, parts).view(n, 1) if q.dtype == torch.uint8 else _bytes(scale)
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, _WIDENED // k)
    if x.is_meta:
        kernels().widen(q, scale, x.dtype)
        return x.new_empty(*x.shape[:-1], n)
    if step >= n:
        return F.linear(x, kernels().widen(q, scale, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        weight = kernels().widen(q[rows], scale[rows], x.dtype)
        out[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return out


def _weight_only(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, *, scheme: str, parts: tuple[int, ...]
) -> Tensor:
    from .weight_only import weight_only

    return weight_only(x, q, scale, scheme, parts, bias)


# -- experts ----------------------------------------------------------------------------------------------------------


def _fake_routes(ids: Tensor, experts: int) -> tuple[Tensor, ...]:
    order = ids.new_empty(ids.shape, dtype=torch.int32)
    return torch.empty_like(ids), order, ids.new_empty(experts, dtype=torch.int32), torch.empty_like(order)


@opaque("(Tensor ids, SymInt experts) -> (Tensor, Tensor, Tensor, Tensor)", _fake_routes)
def sort_routes(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [rows] -> them sorted, their order, int32 [experts] where each expert's rows end, and the inverse order."""
    if len(ids) <= _SORTED_AT_ONCE:
        return kernels().sort_routes(ids.contiguous(), experts)  # type: ignore[no-any-return]
    ids, order = ids.sort()
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    order = order.int()
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), dtype=torch.int32, device=ids.device)
    return ids, order, ends, position


def takes_experts(parts: Iterable[Sequence[int]]) -> bool:
    """Return True if `expert_linear` takes stacks of such parts on this machine."""
    return HAS_TRITON and all(len(each) <= _MAX_PARTS for each in parts)


@opaque(
    "(Tensor x, Tensor q, Tensor scale, str scheme, SymInt[] parts, Tensor? bias, Tensor ids, Tensor? order, "
    "Tensor? ends, SymInt top_k, bool gather) -> Tensor",
    lambda x, q, scale, scheme, parts, bias, ids, *_: x.new_empty(ids.shape[0], q.shape[1]),
)
def expert_linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    scheme: str,
    parts: Sequence[int],
    bias: Tensor | None,
    ids: Tensor,
    order: Tensor | None,
    ends: Tensor | None,
    top_k: int,
    gather: bool,
) -> Tensor:
    """Row i: ``x[i // top_k] @ dequantize(q[ids[i]]).T + bias[ids[i]]``; nothing where ids[i] >= experts.

    Args:
        q: float8_e4m3fn, int8 or as NVFP4 is stored [experts, out, in].
        ids: [rows].
        order, ends: as `sort_routes` gives them; ids are the sorted ones then, and so are the rows of the result.
        gather: row i takes ``x[order[i] // top_k]``; else x is sorted as the result.
    """
    experts, n, k = *q.shape[:2], x.shape[-1]
    rows, dtype = len(ids), x.dtype
    x = x.contiguous()
    if not rows:
        return x.new_empty(0, n)
    each = 1 if order is None else rows // experts
    wide = scheme in _WEIGHT_ONLY or order is None or each < _BUSY
    x_scale = None
    if not wide:
        x, x_scale = (quantize_groups if scheme == "fp8_block" else quantize_rows)(x)
    return kernels().product(  # type: ignore[no-any-return]
        x,
        q,
        _bytes(scale),
        _layout(n, k, scheme, tuple(parts)),
        _tile(x.get_device(), each, n, scheme, wide, True),
        torch.empty(rows, n, dtype=dtype, device=x.device),
        x_scale=x_scale,
        bias=bias,
        routes=kernels().Routes(top_k, ids, order, ends, gather),
    )


@opaque(
    "(Tensor y, Tensor ids, Tensor weights, SymInt experts, Tensor? position) -> Tensor",
    lambda y, ids, *_: y.new_empty(ids.shape[0], y.shape[1]),
)
def combine(y: Tensor, ids: Tensor, weights: Tensor, experts: int, position: Tensor | None) -> Tensor:
    """y [tokens * k, n], ids and weights [tokens, k] -> [tokens, n]: the weighted sum over k, where ids < experts.

    Summed in float32. Row t * k + j of y is that of ids[t, j]; or row position[t * k + j], if y is sorted.
    """
    if not len(ids):
        return y.new_empty(0, y.shape[1])
    return kernels().combine(  # type: ignore[no-any-return]
        y.contiguous(), ids.contiguous(), weights.contiguous(), experts, position
    )


def use_pairs(rows: int) -> bool:
    """Return True if so few (token, expert) pairs are better not sorted."""
    return rows <= _PAIRS
