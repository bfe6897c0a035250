"""Launching Triton's kernels: from the second time on without Triton's own binding of arguments.

That binding takes longer than a small product. Imported only where Triton is installed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from . import ahead

#: (kernel, what decides which binary it is, device) -> the binary, as a launch takes it
_compiled: dict[Any, Any] = {}


# before, what a compiled kernel is launched with was another selection of its arguments
_DIRECT = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


class Launch:
    """A kernel with its grid and all arguments but the tensors: made once, called for each product.

    What it costs the host is much of what a small product takes, so nothing is computed twice. On tensors of meta it
    only notes that its kernel is wanted.

    Args:
        key: with the device, all that decides which binary it is, where every tensor begins at 16 bytes.
    """

    __slots__ = ("_binaries", "_grid", "_kernel", "_key", "_options", "_others")

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], key: tuple[Any, ...], others: tuple[Any, ...], **options: int
    ) -> None:
        self._kernel, self._grid, self._others, self._options = kernel, grid, others, options
        self._key = (id(kernel), *key)  # a kernel's own hash is that of its source
        self._binaries: dict[int, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch it on the device of the first tensor."""
        bits, addresses = 0, []
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            addresses.append(address)
            bits |= address or 0
        device = torch.cuda.current_device()
        mine: int = tensors[0].get_device()  # type: ignore[union-attr]
        if mine != device:
            return self._elsewhere(mine, tensors)
        binary = None if bits & 15 else self._binaries.get(device)
        if binary is None:
            return self._compiling(device, tensors, aligned=not bits & 15)
        run, function, metadata = binary
        stream = triton.runtime.driver.active.get_current_stream(device)
        # no launch metadata, no hooks before and after; addresses, since Triton asks the driver about tensors
        run(*self._grid, stream, function, metadata, None, None, None, *addresses, *self._others)

    def _elsewhere(self, device: int, tensors: tuple[Tensor | None, ...]) -> None:
        if device < 0:
            work = functools.partial(_compile, self._kernel, tensors, self._others, self._options)
            return ahead.want(self._signature(tensors), work)
        with torch.cuda.device(device):
            self(*tensors)

    def _compiling(self, device: int, tensors: tuple[Tensor | None, ...], aligned: bool) -> None:
        """Launch by way of Triton, which compiles what is not compiled yet, unless another grid had it compiled."""
        key = (*self._key, device)
        if aligned and key in _compiled:
            self._binaries[device] = _compiled[key]
            return self(*tensors)
        if aligned and ahead.wanted:
            ahead.settle(self._signature(tensors))
        binary = self._kernel[self._grid](*tensors, *self._others, **self._options)
        if _DIRECT and aligned:
            _compiled[key] = binary.run, binary.function, binary.packed_metadata

    def _signature(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """What decides which binary Triton makes, where every tensor begins at 16 bytes."""
        numbers = []
        for param, value in zip(self._kernel.params[len(tensors) :], self._others, strict=True):
            if param.is_constexpr:
                numbers.append(value)
            else:
                looked_at = not param.do_not_specialize
                numbers.append((value >= 1 << 31, looked_at and value == 1, looked_at and value % 16 == 0))
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return self._kernel, *dtypes, *numbers, *self._options.items()


def _compile(kernel: Any, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...], options: dict[str, int]) -> None:
    """Have Triton compile a kernel for the current device, and the C that launches it; nothing is done on the device.

    Triton takes a tensor on meta, which lies at address 0, for one that begins at 16 bytes.
    """
    binary = kernel.warmup(*tensors, *others, grid=(1, 1, 1), **options)
    triton.runtime.driver.active.launcher_cls(binary.src, binary.metadata)


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (at_least - 1).bit_length()
