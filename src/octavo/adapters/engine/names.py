"""The names by which an engine's users ask for octavo. Imports nothing: every process of an engine knows them."""

from __future__ import annotations

#: the value of ``--load-format``
LOAD_FORMAT = "octavo"
#: ``--quantization`` is this and the scheme's name
PREFIX = "octavo_"
SCHEMES = ("fp8_channel", "fp8_block", "int8_channel", "nvfp4")
#: scheme -> why no engine is given it
REFUSED = {
    "fp8_tensor": "it quantizes the parts of a fused layer a second time, to their largest scale",
    "mxfp8": "few of its kernels take it",
}
#: scheme -> the format of the checkpoint that an engine is told of, where it is not the default: of int8, engines have
#: kernels everywhere for activations in int8, too
FORMATS = {"int8_channel": "compressed-tensors-w8a8"}


def scheme_of_quantization(quantization: str | None) -> str | None:
    """``octavo_fp8_block`` -> ``fp8_block``; None for whatever is not octavo's."""
    if quantization is None or not quantization.startswith(PREFIX):
        return None
    return quantization.removeprefix(PREFIX)
