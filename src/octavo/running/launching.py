"""Launching Triton's kernels: from the second time on without Triton's own binding of arguments.

That binding takes longer than a small product. Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

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
        with torch.cuda.device(mine):
            return launch(kernel, grid, key, tensors, others, **options)
    full = (kernel, key, device)
    found = None if bits & 15 else _compiled.get(full)
    if found is None:
        binary = kernel[grid](*tensors, *others, **options)
        if _DIRECT and not bits & 15:
            _compiled[full] = binary.run, binary.function, binary.packed_metadata
        return
    run, function, metadata = found
    stream = triton.runtime.driver.active.get_current_stream(device)
    # no launch metadata, no hooks before and after
    run(*grid, stream, function, metadata, None, None, None, *tensors, *others)


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (at_least - 1).bit_length()
