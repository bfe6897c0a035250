"""Which stored tensors make a weight, by headers and config, and what contradicts itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import headers
from octavo.checkpoint.codings import Codings, Decoding, find_codings
from octavo.checkpoint.dtypes import BITS

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


NAMED = {f"{X}.weight_packed": f"{X}.weight", "model.experts.1.weight_packed": "model.experts.1.weight"}


@pytest.mark.parametrize("case", FOUND)
def test_what_makes_a_weight_is_found(case: str) -> None:
    tensors, config, decoding = FOUND[case]
    found = find(tensors, config)
    codes = next(iter(tensors))
    name = NAMED.get(codes, codes)
    assert found.by_name.keys() == {name}
    coding = found.by_name[name]
    *lead, words = tensors[codes][1]
    assert (coding.name, coding.shape, coding.decoding) == (name, (*lead, words * decoding.pack), decoding)
    assert found.consumed.keys() == tensors.keys() - {name}
    assert hash(coding) == hash(find(tensors, config).by_name[name])
    assert (math.prod(coding.grid), math.prod(coding.codes_shape)) == (coding.scale.numel, coding.codes.numel)
    assert coding.zero_point is None or math.prod(coding.zero_grid) == coding.zero_point.numel


def test_stacks_of_gpt_oss_are_stored_transposed() -> None:
    tensors: Tensors = {
        "m.experts.down_proj_blocks": ("U8", (3, 8, 2, 16)),
        "m.experts.down_proj_scales": ("U8", (3, 8, 2)),
        "m.experts.down_proj_bias": ("BF16", (3, 8)),
    }
    for config in ({}, {"quantization_config": {"quant_method": "mxfp4"}}):
        found = find(tensors, config)
        coding = found.by_name["m.experts.down_proj"]
        assert (coding.shape, coding.matrix, coding.transposed) == ((3, 64, 8), (3, 8, 64), True)
        assert (coding.codes_shape, coding.grid) == ((3, 8, 32), (3, 8, 2))
        assert coding.decoding == Decoding("e2m1", 1, 32, powers=True)
        assert found.consumed == {
            "m.experts.down_proj_blocks": "numbers of m.experts.down_proj",
            "m.experts.down_proj_scales": "scale of m.experts.down_proj",
        }


def test_a_file_of_its_own_declares_as_config_does(tmp_path: Path) -> None:
    content = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    tensors: Tensors = {
        f"{X}.weight": ("F8_E4M3", (8, 16)),
        f"{X}.weight_scale": ("F32", ()),
        "model.layers.0.self_attn.k_proj.k_scale": ("F32", ()),
    }
    found = find(tensors, {}, tmp_path)
    assert str(found.by_name[f"{X}.weight"]) == "FP8 with a scale for each matrix"
    assert found.consumed == {
        f"{X}.weight_scale": f"scale of {X}.weight",
        "model.layers.0.self_attn.k_proj.k_scale": "scale of a cache",
    }


def test_mixed_layers_are_taken_by_name_where_headers_allow_both() -> None:
    layers = {X: {"quant_algo": "FP8_PB_WO"}, "model.other": {"quant_algo": "FP8"}}
    config = {"quantization_config": {"quant_method": "modelopt", "quantized_layers": layers}}
    one = {f"{X}.weight": ("F8_E4M3", (64, 64)), f"{X}.weight_scale": ("F32", (1, 1))}
    other = {"model.other.weight": ("F8_E4M3", (64, 64)), "model.other.weight_scale": ("F32", (1, 1))}
    found = find({**one, **other}, config).by_name
    assert found[f"{X}.weight"].decoding == Decoding("float8", 128, 128)
    assert found["model.other.weight"].decoding == Decoding("float8", None, None)


RECIPE = ct(
    format="pack-quantized",
    config_groups={
        "a": {"targets": ["Linear"], "weights": {**INT4, "strategy": "channel"}},
        "b": {
            "targets": [r"re:.*layers\.\d+\..*down_proj$", "a.up"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        },
        "c": {"targets": [r"re:.*\.up$"], "weights": {**INT4, "strategy": "channel"}},
    },
)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("m.layers.0.up_proj", "int4"), ("m.layers.1.mlp.down_proj", "int8"), ("a.up", "int8"), ("b.up", "int4")],
)
def test_names_beat_patterns_and_patterns_beat_classes(module: str, kind: str) -> None:
    packed: Tensors = {f"{module}.weight_packed": ("I32", (8, 16)), f"{module}.weight_scale": ("BF16", (8, 1))}
    assert find(packed, RECIPE).by_name[f"{module}.weight"].decoding.kind == f"{kind}_in_int32"


@pytest.mark.parametrize(
    "pattern", ["(.+)+!", "(a|a)*!", "(?=(.*)+).*!", ".*.*.*.*.*.*!", r"\d+\d+\d+\d+\d+!", "(.*){1,9}!", "(" * 400]
)
def test_a_pattern_that_could_take_for_ever_is_not_asked(pattern: str) -> None:
    groups = {
        "a": {"targets": [f"re:{pattern}"], "weights": {**INT4, "strategy": "channel"}},
        "b": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
    }
    name = "a" * 200
    packed: Tensors = {f"{name}.weight_packed": ("I32", (8, 16)), f"{name}.weight_scale": ("BF16", (8, 1))}
    found = find(packed, ct(format="pack-quantized", config_groups=groups))
    assert found.by_name[f"{name}.weight"].decoding.kind == "int8_in_int32"


def test_parameters_that_are_called_as_scales_are_stay() -> None:
    tensors: Tensors = {
        f"{X}.weight": ("F8_E4M3", (200, 256)),
        f"{X}.weight_scale_inv": ("F32", (2, 2)),
        "model.attn.q_scale": ("F32", (64,)),
        "model.attn.k_scale": ("F32", (1,)),
        "model.mlp.gate_proj_scale": ("BF16", (64,)),
    }
    assert find(tensors, BLOCKS).consumed.keys() == {f"{X}.weight_scale_inv", "model.attn.k_scale"}
    caches = fp8(weight_block_size=[128, 128], kv_cache_scheme={"num_bits": 8})
    assert "model.attn.q_scale" in find(tensors, caches).consumed


@pytest.mark.parametrize("value", ["8", [8], None, True, 8.0])
def test_bits_that_are_no_number_are_a_problem(value: Any) -> None:
    _, problems = found_with_problems({**WEIGHT, **SCALE}, ct({**BLOCK, "num_bits": value}))
    assert any("its config.json says of its quantization: num_bits is" in problem for problem in problems)


WEIGHT: Tensors = {f"{X}.weight": ("F8_E4M3", (200, 256))}
SCALE: Tensors = {f"{X}.weight_scale_inv": ("F32", (2, 2))}

WRONG: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "no scale": (
        {**WEIGHT, "y.weight": ("F8_E4M3", (128, 128)), "y.weight_scale_inv": ("F32", (1, 1))},
        BLOCKS,
        f"{X}.weight is F8_E4M3, and has no scale beside it",
    ),
    "no scale at all": (WEIGHT, BLOCKS, f"{X}.weight is F8_E4M3, and has no scale beside it"),
    "two scales": (
        {**WEIGHT, **SCALE, f"{X}.weight_scale": ("F32", (2, 2))},
        BLOCKS,
        f"{X}.weight has 2 scales: {X}.weight_scale_inv and {X}.weight_scale",
    ),
    "a scale of other groups": (
        {**WEIGHT, f"{X}.weight_scale_inv": ("F32", (200, 1))},
        BLOCKS,
        f"{X}.weight_scale_inv is [200, 1] beside {X}.weight, F8_E4M3 [200, 256], and its config.json says FP8 in "
        "blocks of 128x128",
    ),
    "a scale of no groups": (
        {**WEIGHT, f"{X}.weight_scale_inv": ("F32", (2, 2, 2))},
        BLOCKS,
        f"{X}.weight_scale_inv is [2, 2, 2] beside {X}.weight, F8_E4M3 [200, 256]: no grid of scales for it",
    ),
    "a scale of integers": (
        {**WEIGHT, f"{X}.weight_scale_inv": ("I32", (2, 2))},
        BLOCKS,
        f"{X}.weight_scale_inv is I32, and scales of F8_E4M3 are F32",
    ),
    "a scale of a weight that has none": (
        {**WEIGHT, **SCALE, "y.weight": ("BF16", (8, 8)), "y.weight_scale_inv": ("F32", (1, 1))},
        BLOCKS,
        "y.weight_scale_inv is the scale of y.weight, which is BF16, which has none",
    ),
    "a scale of nothing": (
        {**WEIGHT, **SCALE, "y.weight_scale_inv": ("F32", (1, 1))},
        BLOCKS,
        "y.weight_scale_inv is the scale of y.weight, which is not there",
    ),
    "declared by name, and not quantized": (
        {**WEIGHT, **SCALE, "y.weight": ("BF16", (8, 8))},
        ct(BLOCK) | ct(BLOCK, config_groups={"g": {"targets": ["y"], "weights": BLOCK}}),
        "y.weight is BF16, and its config.json says it is quantized",
    ),
    "groups that can't be told": (
        {f"{X}.weight": ("F8_E4M3", (192, 128)), f"{X}.weight_scale": ("F32", (2, 1))},
        {},
        "which of them share a scale can't be told, and no config says it",
    ),
    "a size that is none": (
        {**WEIGHT, **SCALE},
        fp8(weight_block_size=[0, 128]),
        "its config.json says of its quantization: weight_block_size is 0, and no size",
    ),
    "zero points that are not declared": (
        {
            f"{X}.weight_packed": ("I32", (8, 16)),
            f"{X}.weight_scale": ("BF16", (8, 4)),
            f"{X}.weight_zero_point": ("I32", (1, 4)),
        },
        ct({**INT4, "strategy": "group", "group_size": 32}, format="pack-quantized"),
        f"{X}.weight_zero_point: zero points beside {X}.weight_packed, which has none by its kind or its config",
    ),
    "no zero points": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 4))},
        ct({**INT4, "strategy": "group", "group_size": 32, "symmetric": False}, format="pack-quantized"),
        f"{X}.weight_packed has no zero points beside it",
    ),
    "NVFP4 without its scale of scales": (
        {f"{X}.weight_packed": ("U8", (8, 16)), f"{X}.weight_scale": ("F8_E4M3", (8, 2))},
        ct({**FP4, "strategy": "tensor_group", "group_size": 16}, format="nvfp4-pack-quantized"),
        f"{X}.weight_packed should have one scale of its F8_E4M3 scales, and has none",
    ),
    "a scale of scales for a row": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", (8,)),
        },
        {},
        f"{X}.weight_scale_2 is F32 [8], and should be one F32 for each matrix",
    ),
    "packed numbers that may be of either size": (
        {"y.weight_packed": ("I32", (8, 16)), "y.weight_scale": ("BF16", (8, 1))},
        MIXED,
        "y.weight_packed, I32 [8, 16]: may be int4 with a scale for each row, or packed int8 with a scale for each row",
    ),
    "a scale of scales that multiplies by its name, and divides by what is declared": (
        {
            f"{X}.weight_packed": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
        },
        ct({**FP4, "strategy": "tensor_group", "group_size": 16}, format="nvfp4-pack-quantized"),
        f"{X}.weight_scale_2 by its name multiplies, as ModelOpt has it, and by its config.json it divides, as "
        "compressed-tensors has it",
    ),
    "a scale of scales that divides by its name, and multiplies by what is declared": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_global_scale": ("F32", (1,)),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        f"{X}.weight_global_scale by its name divides, as compressed-tensors has it, and by its config.json it "
        "multiplies, as ModelOpt has it",
    ),
    "the same of a mixture": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_global_scale": ("F32", (1,)),
        },
        {
            "quantization_config": {
                **{"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
                "config_groups": {"group_0": {"targets": [X], "weights": {**FP4, "group_size": 16}}},
            }
        },
        f"{X}.weight_global_scale by its name divides",
    ),
    "integers with powers of two, and no config": (
        {f"{X}.weight": ("I8", (8, 128)), f"{X}.weight_scale": ("U8", (8, 4))},
        {},
        f"{X}.weight_scale is [8, 4] beside {X}.weight, I8 [8, 128]: as FP4 they would be in groups of 64, and no "
        "config says so",
    ),
    "bytes with a power of two a row, and no config": (
        {f"{X}.weight": ("U8", (8, 64)), f"{X}.weight_scale": ("F8_E8M0", (8, 1))},
        {},
        "as FP4 they would be in groups of 128",
    ),
    "names of two libraries, and no config": (
        {
            f"{X}.weight_packed": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
        },
        {},
        f"{X}.weight_scale_2 by its name multiplies, as ModelOpt has it, and by {X}.weight_packed beside it it divides",
    ),
    "packed numbers without a scale": (
        {"y.weight_packed": ("I32", (8, 16)), **WEIGHT, **SCALE},
        BLOCKS,
        "y.weight_packed is I32, and has no scale beside it",
    ),
    "NVFP4 of which one lacks its scale": (
        {
            **{f"{x}.weight_packed": ("U8", (8, 16)) for x in (X, "y")},
            **{f"{x}.weight_global_scale": ("F32", (1,)) for x in (X, "y")},
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
        },
        ct({**FP4, "strategy": "tensor_group", "group_size": 16}, format="nvfp4-pack-quantized"),
        "y.weight_packed is U8, and has no scale beside it",
    ),
    "int8 of which one lacks its scale": (
        {f"{X}.weight": ("I8", (8, 16)), f"{X}.weight_scale": ("F32", (8, 1)), "y.weight": ("I8", (8, 16))},
        ct({"num_bits": 8, "type": "int", "strategy": "channel"}, format="int-quantized"),
        "y.weight is I8, and has no scale beside it",
    ),
    "scales of gpt-oss without blocks": (
        {
            **{f"m.{x}_proj_scales": ("U8", (3, 8, 2)) for x in ("up", "down")},
            "m.up_proj_blocks": ("U8", (3, 8, 2, 16)),
        },
        {"quantization_config": {"quant_method": "mxfp4"}},
        "m.down_proj_scales is the scale of m.down_proj_blocks, which is not there",
    ),
    "NVFP4 of ModelOpt of which one lacks its scale": (
        {
            **{f"{x}.weight": ("U8", (8, 16)) for x in (X, "y")},
            **{f"{x}.weight_scale_2": ("F32", ()) for x in (X, "y")},
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "y.weight is U8, and has no scale beside it",
    ),
    "int4 whose scale is called that of its input": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.input_scale": ("BF16", (8, 4))},
        ct({**INT4, "strategy": "group", "group_size": 32}, format="pack-quantized"),
        f"{X}.weight_packed is I32, and has no scale beside it",
    ),
    "a scale of gpt-oss for other groups": (
        {"m.down_proj_blocks": ("U8", (3, 8, 2, 16)), "m.down_proj_scales": ("U8", (3, 8, 4))},
        {"quantization_config": {"quant_method": "mxfp4"}},
        "m.down_proj_scales is [3, 8, 4] beside m.down_proj_blocks, U8 [3, 8, 2, 16], and its config.json says FP4 in "
        "groups of 32",
    ),
    "zero points of another shape": (
        {
            f"{X}.weight": ("I8", (8, 16)),
            f"{X}.weight_scale": ("BF16", (8, 1)),
            f"{X}.weight_zero_point": ("I8", (8, 2)),
        },
        ct({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
        f"{X}.weight_zero_point is I8 [8, 2], and should be I8 [8, 1]",
    ),
}


@pytest.mark.parametrize("group", ["a", "b"])
@pytest.mark.parametrize("targets", [["re:.*up_proj"], [X], ["Linear"]])
def test_groups_may_differ_in_zero_points_alone(targets: list[str], group: str) -> None:
    """Those that are there tell where targets don't."""
    weights = {**INT4, "strategy": "group", "group_size": 32}
    groups = {
        "a": {"targets": targets if group == "a" else ["re:.*down_proj"], "weights": weights},
        "b": {"targets": targets if group == "b" else ["re:.*down_proj"], "weights": {**weights, "symmetric": False}},
    }
    tensors: Tensors = {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 4))}
    zeros = {f"{X}.weight_zero_point": ("I32", (1, 4))}
    config = ct(format="pack-quantized", config_groups=groups)
    found = find({**tensors, **zeros} if group == "b" else tensors, config).by_name[f"{X}.weight"]
    assert (found.zero_point is not None) == (group == "b")
    _, problems = found_with_problems(tensors if group == "b" else {**tensors, **zeros}, config)
    assert any("zero points beside" in problem or "no zero points" in problem for problem in problems)


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        ("columns in another order", f"{X}.weight_g_idx"),
        (
            "columns that were in another order",
            "compressed-tensors with columns in another order (actorder is 'group')",
        ),
        ("int3", "compressed-tensors with 'int' of 3 bits"),
        ("scaled before", f"{X}.pre_quant_scale"),
        ("a part that is not quantized is added", f"{X}.svdquant_lora_a"),
        ("GPTQ beside FP8", "y.qweight (I32) beside y.scales"),
        ("scaled by its inputs", "modelopt 'W4A8_AWQ'"),
    ],
)
def test_what_can_not_be_decoded_is_named(case: str, refused: str) -> None:
    assert find(*NOT_DECODED[case]).refused == refused


SHAPED: Tensors = {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_shape": ("I64", (2,))}
OF_ROWS = {**SHAPED, f"{X}.weight_scale": ("BF16", (8, 1))}


@pytest.mark.parametrize(
    ("tensors", "config", "cols", "decoding"),
    [
        (OF_ROWS, {}, 128, Decoding("int4_in_int32", 1, None)),
        (OF_ROWS, {}, 121, Decoding("int4_in_int32", 1, None)),
        (OF_ROWS, {}, 64, Decoding("int8_in_int32", 1, None)),
        (OF_ROWS, {}, 61, Decoding("int8_in_int32", 1, None)),
        ({**SHAPED, f"{X}.weight_scale": ("BF16", (8, 4))}, {}, 128, Decoding("int4_in_int32", 1, 32)),
        ({**SHAPED, f"{X}.weight_scale": ("F32", (8, 2))}, {}, 64, Decoding("int8_in_int32", 1, 32)),
        (
            {
                **{name.replace(X, "y"): info for name, info in SHAPED.items()},
                **{"y.weight_scale": ("BF16", (8, 4)), "y.weight_zero_point": ("I32", (1, 4))},
            },
            {},
            128,
            Decoding("int4_in_int32", 1, 32),
        ),
        ({name.replace(X, "y"): info for name, info in OF_ROWS.items()}, MIXED, 64, Decoding("int8_in_int32", 1, None)),
    ],
)
def test_a_shape_tells_how_many_bits_packed_numbers_have(
    tensors: Tensors, config: dict[str, Any], cols: int, decoding: Decoding
) -> None:
    module = min(tensors).rpartition(".")[0]
    found, problems = found_with_problems(tensors, config, shapes={f"{module}.weight_shape": (8, cols)})
    assert problems == []
    assert found.by_name[f"{module}.weight"].decoding == decoding


def test_matrices_of_as_many_words_may_be_of_other_bits() -> None:
    tensors = {name.replace(X, x): info for name, info in OF_ROWS.items() for x in (X, "y")}
    found, _ = found_with_problems(tensors, shapes={f"{X}.weight_shape": (8, 128), "y.weight_shape": (8, 64)})
    assert {name: coding.decoding.pack for name, coding in found.by_name.items()} == {f"{X}.weight": 8, "y.weight": 4}


@pytest.mark.parametrize("shape", [(8, 100), (8, 0), (), (16,)])
def test_a_shape_that_is_that_of_no_numbers_is_named(shape: tuple[int, ...]) -> None:
    _, (problem,) = found_with_problems(OF_ROWS, shapes={f"{X}.weight_shape": shape})
    assert problem == (
        f"{X}.weight_scale is [8, 1] beside {X}.weight_packed, I32 [8, 16]: no config says how many bits these have, "
        "nor does a shape beside them"
    )


def test_few_numbers_a_row_may_have_other_bits() -> None:
    """Eight of five to eight bits take two words."""
    tensors = {**OF_ROWS, f"{X}.weight_packed": ("I32", (8, 2))}
    _, (problem,) = found_with_problems(tensors, shapes={f"{X}.weight_shape": (8, 8)})
    assert "no config says how many bits" in problem


@pytest.mark.parametrize("case", WRONG)
def test_a_contradiction_is_a_problem_by_name(case: str) -> None:
    tensors, config, text = WRONG[case]
    _, problems = found_with_problems(tensors, config)
    assert any(text in problem for problem in problems), problems


def test_numbers_without_a_scale_are_all_that_is_named() -> None:
    tensors, config, text = WRONG["NVFP4 of which one lacks its scale"]
    assert found_with_problems(tensors, config)[1] == [text]


NOT_DECODED: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "unquantized": ({}, {}),
    "FP8 that stands for itself": (WEIGHT, {}),
    "GPTQ": ({f"{X}.qweight": ("I32", (1, 8)), f"{X}.scales": ("F16", (1, 8))}, {}),
    "GPTQ beside FP8": (
        {**WEIGHT, f"{X}.weight_scale": ("F32", ()), "y.qweight": ("I32", (1, 8)), "y.scales": ("F16", (1, 8))},
        {},
    ),
    "int4 of which no config says the bits": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 4))},
        {},
    ),
    "columns in another order": (
        {
            f"{X}.weight_packed": ("I32", (8, 16)),
            f"{X}.weight_scale": ("BF16", (8, 4)),
            f"{X}.weight_g_idx": ("I32", (128,)),
        },
        ct({**INT4, "strategy": "group", "group_size": 32}, format="pack-quantized"),
    ),
    "columns that were in another order": (
        {f"{X}.weight_packed": ("I32", (8, 16)), f"{X}.weight_scale": ("BF16", (8, 4))},
        ct({**INT4, "strategy": "group", "group_size": 32, "actorder": "group"}, format="pack-quantized"),
    ),
    "int3": (
        {f"{X}.weight_packed": ("I32", (8, 12)), f"{X}.weight_scale": ("BF16", (8, 4))},
        ct({"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}, format="pack-quantized"),
    ),
    "a part that is not quantized is added": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
            f"{X}.svdquant_lora_a": ("BF16", (4, 32)),
            f"{X}.svdquant_lora_b": ("BF16", (8, 4)),
        },
        {},
    ),
    "scaled before": (
        {
            f"{X}.weight": ("U8", (8, 16)),
            f"{X}.weight_scale": ("F8_E4M3", (8, 2)),
            f"{X}.weight_scale_2": ("F32", ()),
            f"{X}.pre_quant_scale": ("BF16", (32,)),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}},
    ),
    "declared as what is not known": (
        {**WEIGHT, **SCALE},
        {"quantization_config": {"quant_method": "quark"}},
    ),
    "declared without a method": ({**WEIGHT, **SCALE}, {"quantization_config": {"load_in_4bit": True}}),
    "rotated": (
        {**WEIGHT, f"{X}.weight_scale": ("F32", (2, 2))},
        ct(BLOCK, transform_config={"config_groups": {"a": 1}}),
    ),
    "pruned": (
        {**WEIGHT, f"{X}.weight_scale": ("F32", (2, 2))},
        ct(BLOCK, sparsity_config={"format": "sparse-bitmask"}),
    ),
    "scaled by its inputs": (
        {**WEIGHT, **SCALE},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}},
    ),
    "declared, with none of it": ({}, BLOCKS),
}


@pytest.mark.parametrize("case", NOT_DECODED)
def test_what_can_not_be_decoded_has_no_codings(case: str) -> None:
    tensors, config = NOT_DECODED[case]
    assert find(tensors, config) == Codings()


# -- hostile ----------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 32, 127, 128, 200]), max_size=4).map(tuple)
ENDS = (
    *("weight", "weight_scale_inv", "weight_scale", "weight_packed", "weight_zero_point", "weight_shape", "scale"),
    *("weight_scale_2", "weight_global_scale", "input_scale", "k_scale", "gate_up_proj", "gate_up_proj_scale"),
    *("gate_up_proj_blocks", "gate_up_proj_scales", "weight_g_idx", "pre_quant_scale"),
)
NAMES = st.sampled_from([*ENDS, *(f"a.{end}" for end in ENDS), *(f"a.b.{end}" for end in ENDS)])
HEADERS = st.dictionaries(NAMES, st.tuples(st.sampled_from([d for d, bits in BITS.items() if bits % 8 == 0]), SHAPES))
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 4, 8, 16, 32, 128, 10**30, 1.5]),
    st.sampled_from(
        ["fp8", "FP8", "NVFP4", "channel", "group", "block", "tensor", "float", "int", "128x128", "Linear"]
    ),
    st.sampled_from(["float-quantized", "pack-quantized", "nvfp4-pack-quantized", "a", "a.b", "re:(", "0x", "²x³"]),
    st.lists(st.sampled_from([0, 1, 128, -128, "a", None, True]), max_size=3),
)
KEYS = st.sampled_from(
    [
        *(
            "quant_method",
            "quant_algo",
            "weight_block_size",
            "config_groups",
            "weights",
            "strategy",
            "num_bits",
            "type",
        ),
        *("group_size", "block_structure", "symmetric", "format", "targets", "ignore", "quantized_layers", "a", "b"),
    ]
)
VALUES = st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=5), max_leaves=12)
METHODS = st.sampled_from(["fp8", "compressed-tensors", "modelopt", "mxfp4", "fbgemm_fp8", "gptq"])
DECLARATIONS = st.builds(
    lambda method, value: {
        "quantization_config": {"quant_method": method, **(value if isinstance(value, dict) else {})}
    },
    METHODS,
    VALUES,
)


def check_sound(tensors: Tensors, found: Codings, problems: Sequence[str]) -> None:
    """Whatever was found fits together, and problems name a tensor, or the config."""
    for name, coding in found.by_name.items():
        assert (math.prod(coding.grid), math.prod(coding.codes_shape)) == (coding.scale.numel, coding.codes.numel), name
        assert coding.zero_point is None or math.prod(coding.zero_grid) == coding.zero_point.numel
        assert not {info.name for info in coding.stored[1:]} - found.consumed.keys()
    assert all(any(name.split(".")[-1] in text for name in tensors) or "config" in text for text in problems)


@given(HEADERS, st.one_of(st.just({}), DECLARATIONS, st.builds(lambda d: {"text_config": d}, DECLARATIONS)))
def test_any_headers_and_any_config_are_told_apart_or_refused_by_name(tensors: Tensors, config: dict[str, Any]) -> None:
    found, problems = found_with_problems(tensors, config)
    check_sound(tensors, found, problems)


@st.composite
def almost_right(draw: st.DrawFn) -> tuple[Tensors, dict[str, Any]]:
    """What is right but for one thing: a shape, a dtype, a tensor that is missing or twice, a declaration."""
    tensors, config, _ = draw(st.sampled_from(sorted(FOUND.items())))[1]
    tensors, name = dict(tensors), draw(st.sampled_from(sorted(tensors)))
    dtype, shape = tensors[name]
    change = draw(st.sampled_from(["dtype", "axis", "axes", "missing", "twice", "config", "declaration"]))
    if change == "dtype":
        tensors[name] = (draw(st.sampled_from([d for d, bits in BITS.items() if bits % 8 == 0])), shape)
    elif change == "axis" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        side = draw(st.sampled_from([0, 1, 2, 3, shape[axis] + 1, shape[axis] * 2, 128]))
        tensors[name] = (dtype, (*shape[:axis], side, *shape[axis + 1 :]))
    elif change == "axes":
        tensors[name] = (dtype, draw(st.sampled_from([(), tuple(shape)[:1], (*shape, 1), (1, *shape), (2, *shape)])))
    elif change == "missing":
        del tensors[name]
    elif change == "twice":
        tensors[name + draw(st.sampled_from(["_scale", "_scale_inv", "_scale_2", "_zero_point", "_g_idx"]))] = (
            dtype,
            shape,
        )
    elif change == "config":
        config = {}
    else:
        config = draw(st.sampled_from(sorted(FOUND.items())))[1][1]
    return tensors, config


@given(almost_right())
def test_what_is_almost_right_is_sound_or_refused_by_name(case: tuple[Tensors, dict[str, Any]]) -> None:
    check_sound(case[0], *found_with_problems(*case))
