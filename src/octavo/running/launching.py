"""Launching Triton's kernels: from the second time on without Triton's own binding of arguments.

That binding takes longer than a small product. On tensors of meta a launch computes nothing: it notes that its kernel
is wanted, for `ahead` to compile. Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import ahead

_compiled: dict[Any, Any] = {}


# before, what a compiled kernel is launched with was another selection of its arguments
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    key: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    others: tuple[Any, ...],
    **options: int,
) -> None:
    """Launch a kernel on the device of the first tensor; from the second time on without Triton's binding.

    On meta it is noted as wanted instead.

    Args:
        key: with the device, all that decides which binary it is, where every tensor begins at 16 bytes.
    """
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    device = torch.cuda.current_device()
    mine = tensors[0].get_device()  # type: ignore[union-attr]
    if mine != device:
        if mine < 0:
            ahead.want(_signature(kernel, tensors, others, options), lambda: _compile(kernel, tensors, others, options))
            return None
        with torch.cuda.device(mine):
            return launch(kernel, grid, key, tensors, others, **options)
    full = (kernel, key, device)
    found = None if bits & 15 else _compiled.get(full)
    if found is None:
        if ahead.wanted and not bits & 15:
            ahead.settle(_signature(kernel, tensors, others, options))
        binary = kernel[grid](*tensors, *others, **options)
        if _DIRECT and not bits & 15:
            _compiled[full] = binary.run, binary.function, binary.packed_metadata
        return
    run, function, metadata = found
    stream = triton.runtime.driver.active.get_current_stream(device)
    # no launch metadata, no hooks before and after
    run(*grid, stream, function, metadata, None, None, None, *tensors, *others)


def _compile(kernel: Any, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...], options: dict[str, int]) -> None:
    """Have Triton compile a kernel for the current device, and the C that launches it; nothing is done on the device.

    Triton takes a tensor on meta, which lies at address 0, for one that begins at 16 bytes.
    """
    binary = kernel.warmup(*tensors, *others, grid=(1, 1, 1), **options)
    triton.runtime.driver.active.launcher_cls(binary.src, binary.metadata)


def _signature(
    kernel: Any, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...], options: dict[str, int]
) -> tuple[Any, ...]:
    """What decides which binary Triton makes, where every tensor begins at 16 bytes."""
    numbers = []
    for param, value in zip(kernel.params[len(tensors) :], others, strict=True):
        if param.is_constexpr:
            numbers.append(value)
        else:
            looked_at = not param.do_not_specialize
            numbers.append((value >= 1 << 31, looked_at and value == 1, looked_at and value % 16 == 0))
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    return kernel, *dtypes, *numbers, *options.items()


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (at_least - 1).bit_length()
