"""What a rank of an engine tells of its GPU's memory and of its parameters."""

from __future__ import annotations

import torch

_WORDS = 1 << 24  # summed at once


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> dict[str, int]:
    """What torch's allocator counts; zeros without a GPU."""
    if not torch.cuda.is_available():
        return {"allocated_bytes": 0, "reserved_bytes": 0, "allocated_peak_bytes": 0, "reserved_peak_bytes": 0}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "reserved_bytes": torch.cuda.memory_reserved(),
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }


def sum_of(tensor: torch.Tensor) -> str:
    """dtype, shape and a sum of the bytes: the same for two tensors with the same bytes."""
    whole = tensor.t() if tensor.ndim == 2 and not tensor.is_contiguous() else tensor  # as kernels have it
    flat = whole.contiguous().reshape(-1).view(torch.uint8)
    words = flat[: flat.numel() // 8 * 8].view(torch.int64)
    total = sum(number * int(part.sum()) for number, part in enumerate(words.split(_WORDS), 1))
    return f"{tensor.dtype} {list(tensor.shape)} {total} {flat[words.numel() * 8 :].tolist()}"
