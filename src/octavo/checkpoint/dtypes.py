"""The dtypes of the safetensors format: their names, widths, and what torch calls them.

Source: https://github.com/huggingface/safetensors (``enum Dtype``). Dtypes that torch lacks have ``None``: their
bytes can be carried from file to file, but not placed in a tensor.
"""

from __future__ import annotations

import torch

_TORCH_NAMES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F4": (4, "-"),
    "F6_E2M3": (6, "-"),
    "F6_E3M2": (6, "-"),
}

#: safetensors name -> bits an element
BITS: dict[str, int] = {name: bits for name, (bits, _) in _TORCH_NAMES.items()}
#: safetensors name -> torch dtype, or None where torch has none
TORCH: dict[str, torch.dtype | None] = {
    name: getattr(torch, torch_name, None) for name, (_, torch_name) in _TORCH_NAMES.items()
}
#: what octavo moves: torch's dtypes, and the bytes of what torch has no dtype for
MOVED: dict[str, torch.dtype] = {name: dtype or torch.uint8 for name, dtype in TORCH.items()}
#: torch dtype -> safetensors name
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH.items() if dtype is not None}

#: what octavo quantizes; everything else passes through
QUANTIZABLE = frozenset({torch.bfloat16, torch.float16, torch.float32})


def moved_bits(name: str) -> int:
    """Bits of one moved element: those of a byte where torch lacks the dtype."""
    return BITS[name] if TORCH[name] is not None else 8


def short(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bf16``: the names that tables and messages use."""
    name = str(dtype).removeprefix("torch.")
    return {
        "bfloat16": "bf16",
        "float16": "fp16",
        "float32": "fp32",
        "float8_e4m3fn": "e4m3fn",
        "float8_e8m0fnu": "e8m0",
    }.get(name, name)
