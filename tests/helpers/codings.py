"""Headers and configs of checkpoints that are quantized already, and what is found by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from helpers import headers
from octavo.checkpoint.codings import Codings, Decoding, find_codings

#: name -> (dtype, shape)
Tensors = Mapping[str, tuple[str, Sequence[int]]]
X = "model.layers.0.mlp.up_proj"
PLAIN: Tensors = {"model.norm.weight": ("BF16", (8,)), "lm_head.weight": ("BF16", (32, 256))}


def find(tensors: Tensors, config: Mapping[str, Any] | None = None, folder: Path = Path("/nowhere")) -> Codings:
    """What is found without a problem."""
    found, problems = found_with_problems(tensors, config, folder)
    assert problems == []
    return found


def found_with_problems(
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    folder: Path = Path("/nowhere"),
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[Codings, list[str]]:
    """Args: shapes: what tensors hold that are shapes of others."""
    named = {**PLAIN, **tensors}
    infos = headers({n: shape for n, (_, shape) in named.items()}, {n: d for n, (d, _) in named.items()}).tensors
    problems: list[str] = []
    return find_codings(folder, config or {}, infos, problems, lambda info: shapes.get(info.name, ())), problems


def fp8(**more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", **more}}


def ct(*weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": dict(each)} for i, each in enumerate(weights)}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": groups,
            **more,
        }
    }


FLOAT = {"num_bits": 8, "type": "float"}
CHANNEL = {**FLOAT, "strategy": "channel"}
BLOCK = {**FLOAT, "strategy": "block", "block_structure": [128, 128]}
INT4 = {"num_bits": 4, "type": "int"}
FP4 = {"num_bits": 4, "type": "float"}
MIXED = ct(
    format="pack-quantized",
    config_groups={
        "a": {"targets": ["re:.*experts.*"], "weights": {**INT4, "strategy": "channel"}},
        "b": {"targets": [X], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    },
)
BLOCKS = fp8(weight_block_size=[128, 128])
WEIGHT: Tensors = {f"{X}.weight": ("F8_E4M3", (200, 256))}
SCALE: Tensors = {f"{X}.weight_scale_inv": ("F32", (2, 2))}

#: what makes a weight: its tensors, numbers first, the config, and how it is decoded
FOUND: dict[str, tuple[Tensors, dict[str, Any], Decoding]] = {
    "DeepSeek's blocks": (
        {f"{X}.weight": ("F8_E4M3", (200, 256)), f"{X}.weight_scale_inv": ("F32", (2, 2))},
        BLOCKS,
        Decoding("float8", 128, 128),
    ),
    "blocks with scales that are said to be powers of two": (
        {f"{X}.weight": ("F8_E4M3", (200, 256)), f"{X}.weight_scale_inv": ("F32", (2, 2))},
        fp8(weight_block_size=[128, 128], scale_fmt="ue8m0"),
        Decoding("float8", 128, 128, powers=True),
    ),
    "blocks, of a part of the model": (
        {f"{X}.weight": ("F8_E4M3", (200, 256)), f"{X}.weight_scale_inv": ("BF16", (2, 2))},
        {"text_config": BLOCKS},
        Decoding("float8", 128, 128),
    ),
    "blocks of another size": (
        {f"{X}.weight": ("F8_E4M3", (200, 256)), f"{X}.weight_scale_inv": ("F32", (4, 4))},
        fp8(weight_block_size=[64, 64]),
        Decoding("float8", 64, 64),
    ),
    "blocks in a stack": (
        {"m.experts.gate_up_proj": ("F8_E4M3", (2, 200, 256)), "m.experts.gate_up_proj_scale_inv": ("F32", (2, 2, 2))},
        BLOCKS,
        Decoding("float8", 128, 128),
    ),
    "DeepSeek-V4's names": (
        {"layers.0.attn.wo.weight": ("F8_E4M3", (256, 256)), "layers.0.attn.wo.scale": ("F8_E8M0", (2, 2))},
        BLOCKS,
        Decoding("float8", 128, 128, powers=True),
    ),
    "Mistral's scale a tensor": (
        {
            f"{X}.weight": ("F8_E4M3", (8, 8)),
            f"{X}.weight_scale_inv": ("BF16", ()),
            f"{X}.activation_scale": ("BF16", ()),
        },
        fp8(weight_block_size=None, activation_scheme="static"),
        Decoding("float8", None, None),
    ),
    "compressed-tensors, a scale a row": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 1))},
        ct(CHANNEL),
        Decoding("float8", 1, None),
    ),
    "the same, by an axis": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("BF16", (8,))},
        ct(CHANNEL),
        Decoding("float8", 1, None),
    ),
    "compressed-tensors, a scale": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("BF16", (1,)), f"{X}.input_scale": ("BF16", (1,))},
        ct({**FLOAT, "strategy": "tensor"}),
        Decoding("float8", None, None),
    ),
    "compressed-tensors, blocks": (
        {f"{X}.weight": ("F8_E4M3", (8, 256)), f"{X}.weight_scale": ("BF16", (1, 2))},
        ct(BLOCK),
        Decoding("float8", 128, 128),
    ),
    "compressed-tensors, the one of two groups that fits": (
        {f"{X}.weight": ("F8_E4M3", (200, 256)), f"{X}.weight_scale": ("BF16", (2, 2))},
        ct(CHANNEL, BLOCK),
        Decoding("float8", 128, 128),
    ),
    "compressed-tensors by its older key": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 1))},
        {"compression_config": ct(CHANNEL)["quantization_config"]},
        Decoding("float8", 1, None),
    ),
    "compressed-tensors, int8": (
        {f"{X}.weight": ("I8", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 1))},
        ct({"num_bits": 8, "type": "int", "strategy": "channel"}, format="int-quantized"),
        Decoding("int8", 1, None),
    ),
    "compressed-tensors, four bits that take a byte each": (
        {f"{X}.weight": ("I8", (8, 16)), f"{X}.weight_scale": ("F32", (8, 1))},
        ct({**INT4, "strategy": "channel"}, format="int-quantized"),
        Decoding("int8", 1, None),
    ),
    "compressed-tensors, in capitals": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("F32", (8, 1))},
        ct({"num_bits": 8, "type": "FLOAT", "strategy": "CHANNEL"}),
        Decoding("float8", 1, None),
    ),
    "compressed-tensors, int8 with zero points": (
        {
            f"{X}.weight": ("I8", (8, 16)),
            f"{X}.weight_scale": ("BF16", (8, 1)),
            f"{X}.weight_zero_point": ("I8", (8, 1)),
        },
        ct({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, format="int-quantized"),
        Decoding("int8", 1, None),
    ),
    "mxfp8": (
        {f"{X}.weight": ("F8_E4M3", (8, 64)), f"{X}.weight_scale": ("U8", (8, 2))},
        ct({**FLOAT, "strategy": "group", "group_size": 32}, format="mxfp8-quantized"),
        Decoding("float8", 1, 32, powers=True),
    ),
    **{
        f"ModelOpt, {name}": (
            {f"{X}.weight": ("I8", (8, 16)), f"{X}.weight_scale": ("F32", (8,)), f"{X}.input_scale": ("F32", ())},
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": name}},
            Decoding("int8", 1, None),
        )
        for name in ("W8A16", "W8A8_SQ_PER_CHANNEL")
    },
    "ModelOpt, a scale": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("F32", ()), f"{X}.input_scale": ("F32", ())},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        Decoding("float8", None, None),
    ),
    "ModelOpt, blocks with axes between": (
        {f"{X}.weight": ("F8_E4M3", (256, 128)), f"{X}.weight_scale": ("F32", (2, 1, 1, 1))},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}},
        Decoding("float8", 128, 128),
    ),
    "fbgemm": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("F32", (8, 1))},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        Decoding("float8", 1, None),
    ),
    "fbgemm, experts of [in, out]": (
        {"m.experts.down_proj": ("F8_E4M3", (3, 8, 16)), "m.experts.down_proj_scale": ("F32", (3, 1, 16))},
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        Decoding("float8", None, 1),
    ),
    "ModelOpt, mixed, by groups": (
        {f"{X}.weight": ("F8_E4M3", (8, 16)), f"{X}.weight_scale": ("F32", ())},
        {
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "config_groups": {
                    "a": {"targets": [X], "weights": FLOAT},
                    "b": {"targets": ["y"], "weights": {**FP4, "group_size": 16}},
                },
            }
        },
        Decoding("float8", None, None),
    ),
    "undeclared, blocks": (
        {f"{X}.weight": ("F8_E4M3", (128, 256)), f"{X}.weight_scale_inv": ("F32", (1, 2))},
        {},
        Decoding("float8", None, 128),
    ),
    "declared by an empty object": (
        {f"{X}.weight": ("F8_E5M2", (12, 256)), f"{X}.weight_scale": ("F32", (12, 1))},
        {"quantization_config": {}},
        Decoding("float8", 1, None),
    ),
    "undeclared, a scale a row": (
        {f"{X}.weight": ("F8_E5M2", (12, 256)), f"{X}.weight_scale": ("F32", (12, 1))},
        {},
        Decoding("float8", 1, None),
    ),
    "compressed-tensors, int4 in groups": (
        {
            f"{X}.weight_packed": ("I32", (8, 16)),
            f"{X}.weight_scale": ("BF16", (8, 4)),
            f"{X}.weight_shape": ("I64", (2,)),
        },
        ct({**INT4, "strategy": "group", "group_size": 32}, format="pack-quantized"),
        Decoding("int4_in_int32", 1, 32),
    ),
    "compressed-tensors, int4 with zero points": (
        {
            f"{X}.weight_packed": ("I32", (12, 16)),
            f"{X}.weight_scale": ("F16", (12, 4)),
            f"{X}.weight_shape": ("I32", (2,)),
            f"{X}.weight_zero_point": ("I32", (2, 4)),
        },
        ct({**INT4, "strategy": "group", "group_size": 32, "symmetric": False}, format="pack-quantized"),
        Decoding("int4_in_int32", 1, 32),
    ),
    "compressed-tensors, packed int8": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 1))},
        ct({"num_bits": 8, "type": "int", "strategy": "channel"}, format="pack-quantized"),
        Decoding("int8_in_int32", 1, None),
    ),
    "compressed-tensors, packed int8 by its name": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 1))},
        MIXED,
        Decoding("int8_in_int32", 1, None),
    ),
    "compressed-tensors, packed int4 by a pattern": (
        {"model.experts.1.weight_packed": ("I32", (8, 16)), "model.experts.1.weight_scale": ("BF16", (8, 1))},
        MIXED,
        Decoding("int4_in_int32", 1, None),
    ),
    "compressed-tensors, NVFP4": (
        {
            f"{X}.weight_packed": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_global_scale": ("F32", (1,)),
            f"{X}.input_global_scale": ("F32", (1,)),
        },
        ct({**FP4, "strategy": "tensor_group", "group_size": 16}, format="nvfp4-pack-quantized"),
        Decoding("e2m1", 1, 16, divided=True),
    ),
    "compressed-tensors, MXFP4": (
        {f"{X}.weight_packed": ("U8", (8, 32)), f"{X}.weight_scale": ("U8", (8, 2))},
        ct({**FP4, "strategy": "group", "group_size": 32}, format="mxfp4-pack-quantized"),
        Decoding("e2m1", 1, 32, powers=True),
    ),
    "ModelOpt, NVFP4": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
            f"{X}.input_scale": ("F32", ()),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        Decoding("e2m1", 1, 16),
    ),
    "ModelOpt, NVFP4 in a stack": (
        {
            "m.experts.down_proj": ("U8", (3, 8, 16)),
            "m.experts.down_proj_weight_scale": ("F8_E4M3", (3, 8, 2)),
            "m.experts.down_proj_weight_scale_2": ("F32", (3,)),
            "m.experts.down_proj_input_scale": ("F32", ()),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}},
        Decoding("e2m1", 1, 16),
    ),
    "undeclared, NVFP4": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
        },
        {},
        Decoding("e2m1", 1, 16),
    ),
    "DeepSeek-V4's experts": (
        {"layers.0.ffn.experts.0.w1.weight": ("I8", (8, 32)), "layers.0.ffn.experts.0.w1.scale": ("F8_E8M0", (8, 2))},
        BLOCKS,
        Decoding("e2m1", 1, 32, powers=True),
    ),
    "a scale for each expert": (
        {"m.experts.down_proj": ("F8_E4M3", (3, 8, 16)), "m.experts.down_proj_weight_scale": ("F32", (3,))},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        Decoding("float8", None, None),
    ),
}
