"""What readers' configs say of a scheme."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..numerics import nvfp4, schemes
from ..planning.placement import Placement

FP8_CONFIG = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
CT_FORMATS = {
    "fp8_channel": "float-quantized",
    "fp8_block": "float-quantized",
    "fp8_tensor": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "int8_channel": "int-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def arguments(scheme: str, placements: Iterable[Placement], packed: bool = False) -> dict[str, Any]:
    """The weights, input_activations and format of a compressed-tensors config group."""
    if schemes.get(scheme).packed:
        return {
            "weights": {
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "dynamic": False,
                "strategy": "tensor_group",
                "group_size": nvfp4.GROUP,
                "scale_dtype": "torch.float8_e4m3fn",
                "zp_dtype": "torch.float8_e4m3fn",
            },
            "input_activations": None,
            "output_activations": None,
            "format": CT_FORMATS[scheme],
        }
    kind = "float" if schemes.get(scheme).dtype.is_floating_point else "int"
    base = {"num_bits": 8, "type": kind, "symmetric": True}
    weights: dict[str, Any] = {**base, "dynamic": False}
    inputs: dict[str, Any] = {**base, "dynamic": True}
    if scheme in ("fp8_channel", "int8_channel"):
        weights["strategy"], inputs["strategy"] = "channel", "token"
        if packed:  # what the library calls the group of a whole row; vLLM 0.24 asks for it where weights are experts'
            weights["group_size"] = -1
    elif scheme == "fp8_tensor":
        weights["strategy"], inputs["strategy"] = "tensor", "token"
    elif scheme == "fp8_block":
        weights |= {"strategy": "block", "block_structure": [128, 128]}
        inputs |= {"strategy": "group", "group_size": 128}
    else:
        group = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        weights |= group
        inputs |= group
    # readers can't cut ragged activations into groups: then weights alone are quantized
    ragged = scheme == "fp8_block" and any(p.shape[-1] % 128 for p in placements)
    return {
        "weights": weights,
        "input_activations": None if ragged or packed else inputs,
        "output_activations": None,
        "format": "pack-quantized" if packed else CT_FORMATS[scheme],
    }
