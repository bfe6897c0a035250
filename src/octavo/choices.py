"""The schemes and formats that users choose by name, as data, and what is taken where they choose nothing.

A scheme is a row here, and a format is one. What they mean is elsewhere: the arithmetic in `octavo.schemes`, what a
format's readers take in `octavo.conversion.formats`. This module imports nothing of octavo and no torch, so that the
help and the completion of the command line can list the names at once.
"""

from __future__ import annotations

from typing import NamedTuple


class SchemeTerms(NamedTuple):
    """A scheme, by how it cuts a matrix ``[out, in]`` into groups that share a scale."""

    summary: str  # of which there is one scale, in a few words
    group_rows: int | None  # rows of a scale group; None: all
    group_cols: int | None  # columns of a scale group; None: all
    power_of_two: bool = False  # e8m0 scales as OCP MX defines them; else float32 numbers that bf16 can hold
    dtype: str = "float8_e4m3fn"  # of the numbers, by torch's name; uint8: two in a byte, and scales among them


class FormatTerms(NamedTuple):
    """A format, by the scales that it keeps beside each weight and the schemes that it can express."""

    summary: str  # who reads it, in a few words
    scale_suffix: str  # appended to the weight's name
    schemes: tuple[str, ...]


SCHEMES = {
    "fp8_channel": SchemeTerms("a scale for each row", 1, None),
    "fp8_block": SchemeTerms("one for each 128x128 block", 128, 128),
    "fp8_tensor": SchemeTerms("one for each matrix", None, None),
    "mxfp8": SchemeTerms("one for 32 columns of a row, a power of two", 1, 32, power_of_two=True),
    "int8_channel": SchemeTerms("one for each row, of integers instead of FP8", 1, None, dtype="int8"),
    "nvfp4": SchemeTerms("one for 16 columns of a row, of numbers of four bits", None, None, dtype="uint8"),
}
#: of all that is not quantized already
DEFAULT_SCHEME = "fp8_channel"
#: what a source that is quantized already has, where it is one of these; else the default
AUTO = "auto"
PASSING = ("fp8_block", "fp8_channel", "fp8_tensor", "int8_channel")

FORMATS = {
    "compressed-tensors": FormatTerms("vLLM, and transformers with compressed-tensors", "_scale", tuple(SCHEMES)),
    "compressed-tensors-w8a8": FormatTerms(
        "the same, activations in int8, too; int8_channel only", "_scale", ("int8_channel",)
    ),
    "fp8": FormatTerms("vLLM and transformers, fp8_block only", "_scale_inv", ("fp8_block",)),
}
DEFAULT_FORMAT = "compressed-tensors"

#: who reads what is converted, and can be asked what it would make of it
READERS = ("transformers", "vllm")

#: bound on memory beyond the result
DEFAULT_STAGING_BYTES = 256 << 20
