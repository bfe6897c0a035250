"""Whatever headers and configs say, codings are found that fit together, or a problem is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from helpers.codings import FOUND, Tensors, found_with_problems
from octavo.checkpoint.codings import Codings
from octavo.checkpoint.dtypes import BITS

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
