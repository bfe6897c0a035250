"""Which stored tensors make a weight, by headers and config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from helpers.codings import BLOCKS, FOUND, INT4, MIXED, Tensors, X, ct, find, found_with_problems, fp8
from octavo.checkpoint.codings import Decoding

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


@pytest.mark.parametrize(
    ("config", "stands"),
    [
        (ct({"num_bits": 8, "type": "float", "strategy": "channel"}, ignore=["lm_head", "y"]), True),
        (ct({"num_bits": 8, "type": "float", "strategy": "channel"}, ignore=["re:y$"]), True),
        (fp8(modules_to_not_convert=["y"]), True),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["y"]}}, True),
        (ct({"num_bits": 8, "type": "float", "strategy": "channel"}, ignore=["lm_head", "yy", 7]), False),
        (fp8(modules_to_not_convert="y"), False),
    ],
)
def test_fp8_without_a_scale_stands_for_itself_where_a_config_says_that_it_is_not_quantized(
    config: dict[str, Any], stands: bool
) -> None:
    """As a conversion has it that kept such a tensor."""
    by_row = config["quantization_config"]["quant_method"] == "compressed-tensors"
    scale = {f"{X}.weight_scale": ("F32", (8, 1) if by_row else ())}
    found, problems = found_with_problems(
        {f"{X}.weight": ("F8_E4M3", (8, 16)), **scale, "y.weight": ("F8_E4M3", (8, 16))}, config
    )
    assert found.by_name.keys() == {f"{X}.weight"}
    assert problems == ([] if stands else ["y.weight is F8_E4M3, and has no scale beside it"])
