"""What of headers and config contradicts itself, and what can't be decoded."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.codings import (
    BLOCK,
    BLOCKS,
    FP4,
    INT4,
    MIXED,
    SCALE,
    WEIGHT,
    Tensors,
    X,
    ct,
    find,
    found_with_problems,
    fp8,
)
from octavo.checkpoint.codings import Codings

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


@pytest.mark.parametrize("case", WRONG)
def test_a_contradiction_is_a_problem_by_name(case: str) -> None:
    tensors, config, text = WRONG[case]
    _, problems = found_with_problems(tensors, config)
    assert any(text in problem for problem in problems), problems


def test_numbers_without_a_scale_are_all_that_is_named() -> None:
    tensors, config, text = WRONG["NVFP4 of which one lacks its scale"]
    assert found_with_problems(tensors, config)[1] == [text]


@pytest.mark.parametrize("value", ["8", [8], None, True, 8.0])
def test_bits_that_are_no_number_are_a_problem(value: Any) -> None:
    _, problems = found_with_problems({**WEIGHT, **SCALE}, ct({**BLOCK, "num_bits": value}))
    assert any("its config.json says of its quantization: num_bits is" in problem for problem in problems)


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
    "int8 scaled before": (
        {
            f"{X}.weight": ("I8", (8, 16)),
            f"{X}.weight_scale": ("F32", (8,)),
            f"{X}.pre_quant_scale": ("BF16", (16,)),
        },
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}},
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
