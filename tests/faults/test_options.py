"""Recipes and options that are unknown, ambiguous, or can't be honoured: named, before a weight byte is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import fails

import octavo
from octavo import Recipe
from octavo.errors import DeviceError, OctavoError, RecipeError

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_weight_is_read")

Q = "model.layers.0.self_attn.q_proj.weight"

#: case -> (what makes the recipe, what the error says)
RECIPES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "an unknown scheme": (lambda: "fp9", ("unknown scheme 'fp9'", "fp8_channel, fp8_block, fp8_tensor, mxfp8")),
    "a scheme that is a number": (lambda: 8, ("unknown scheme 8",)),
    "an unknown scheme of a target": (lambda: Recipe(targets={"*": "fp9"}), ("unknown scheme 'fp9'",)),
    "an unknown key": (
        lambda: {"scheme": "fp8_block", "skip": ["x"]},
        ("unknown recipe key 'skip'", "scheme, targets, ignore"),
    ),
    "ignore as text": (lambda: Recipe(ignore="lm_head"), ("ignore must be a list of patterns", "'lm_head'")),
    "ignore as a number": (lambda: Recipe(ignore=5), ("ignore must be a list of patterns, not 5",)),  # type: ignore[arg-type]
    "ignore with a number": (lambda: Recipe(ignore=["a", 5]), ("ignore must be a list of patterns",)),  # type: ignore[list-item]
    "targets as a number": (lambda: {"targets": 5}, ("targets must be patterns and their schemes, not 5",)),
    "targets as text": (lambda: {"targets": "ab"}, ("targets must be patterns and their schemes, not the text 'ab'",)),
    "targets with a number": (lambda: {"targets": {5: "mxfp8"}}, ("targets must be patterns and their schemes",)),
    "a scheme that is a list": (lambda: {"scheme": []}, ("unknown scheme []",)),
    "a target's scheme that is a list": (lambda: {"targets": {"*": []}}, ("unknown scheme []",)),
    "a key that is a number": (lambda: {5: "mxfp8"}, ("unknown recipe key 5",)),
    "an expression that repeats too often": (
        lambda: Recipe(ignore=["re:a{1,99999999999}"]),
        ("no regular expression",),
    ),
    "an expression that is nested too deeply": (
        lambda: Recipe(ignore=["re:" + "(" * 2000 + ")" * 2000]),
        ("no regular expression",),
    ),
    "a pattern of thousands of characters": (
        lambda: Recipe(ignore=["a" * 5000]),
        ("a pattern of 5,000 characters; at most 4,096",),
    ),
    "an empty pattern": (lambda: Recipe(ignore=[""]), ("an empty pattern",)),
    "a regular expression that is none": (lambda: Recipe(ignore=["re:("]), ("'re:('", "no regular expression")),
    "a target's expression that is none": (
        lambda: Recipe(None, {"re:[": "mxfp8"}),
        ("'re:['", "no regular expression"),
    ),
    "an ignored glob without a match": (lambda: Recipe(ignore=["*.mlpp.*"]), ("'*.mlpp.*' matches no tensor",)),
    "an ignored expression without a match": (lambda: Recipe(ignore=["re:.*mlpp"]), ("'re:.*mlpp' matches no tensor",)),
    "an ignored name without a match": (
        lambda: Recipe(ignore=["model.layers.0.self_attn.q_prj.weight"]),
        ("q_prj.weight' matches no tensor", f"the nearest name is {Q!r}"),
    ),
    "a name that is only the beginning of one": (lambda: Recipe(ignore=["model.layers.0.sel"]), ("matches no tensor",)),
    "a target without a match": (lambda: Recipe(None, {"*.nothing": "mxfp8"}), ("'*.nothing' matches no tensor",)),
    "two targets of different schemes": (
        lambda: Recipe(targets={"*.q_proj": "fp8_block", "model.layers.0.*": "mxfp8"}),
        (f"{Q}: matched by targets of different schemes", "'*.q_proj' -> fp8_block", "'model.layers.0.*' -> mxfp8"),
    ),
    "a norm as a target": (
        lambda: Recipe(targets={"model.norm": "mxfp8"}),
        ("model.norm.weight", "can't be quantized"),
    ),
    "an embedding as a target": (
        lambda: Recipe(targets={"model.embed_tokens.weight": "mxfp8"}),
        ("model.embed_tokens.weight: targeted by", "can't be quantized", "Embedding"),
    ),
    "a name that is ignored and targeted": (
        lambda: Recipe(targets={Q: "mxfp8"}, ignore=["*.q_proj"]),
        (f"{Q}: both ignored by '*.q_proj' and targeted by {Q!r}",),
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe_that_is_wrong_is_explained(case: str, llama: Path) -> None:
    make, says = RECIPES[case]
    fails(RecipeError, says, lambda: octavo.load(llama, make()))
    fails(RecipeError, says, lambda: octavo.plan(llama, make()))


@pytest.mark.parametrize("scheme", ["", False, 0], ids=["empty text", "False", "zero"])
def test_scheme_that_is_false_but_not_none_is_refused(scheme: Any, llama: Path) -> None:
    fails(RecipeError, "unknown scheme", lambda: octavo.plan(llama, scheme))
    fails(RecipeError, "unknown scheme", lambda: Recipe(targets={"*": scheme}))


@pytest.mark.parametrize("pattern", ["*.gate_proj.weight", "*.experts.0.*", "model.layers.0.mlp.experts.1"])
def test_pattern_that_hits_some_sources_of_a_stack_is_explained(pattern: str, moe: Path) -> None:
    says = ("is one parameter made of", f"{pattern!r} matches", "but not")
    fails(RecipeError, says, lambda: octavo.load(moe, ignore=[pattern]))
    fails(RecipeError, says, lambda: octavo.load(moe, Recipe(None, {pattern: "fp8_block"})))


def test_all_problems_of_a_recipe_come_in_one_message(llama: Path) -> None:
    recipe = Recipe(targets={"model.norm": "mxfp8", "*.k_proj": "fp8_block", "model.layers.*": "mxfp8"})
    says = ("3 problems", "model.norm.weight", "layers.0.self_attn.k_proj.weight", "layers.1.self_attn.k_proj.weight")
    fails(RecipeError, says, lambda: octavo.load(llama, recipe))
    says = ("2 problems", "'*.one' matches no tensor", "'*.two' matches no tensor")
    fails(RecipeError, says, lambda: octavo.load(llama, ignore=["*.one", "*.two"]))


#: case -> (options of load, class, what the error says)
OPTIONS: dict[str, tuple[dict[str, Any], type[OctavoError], tuple[str, ...]]] = {
    "no threads": ({"threads": 0}, DeviceError, ("threads is 0; at least 1",)),
    "threads beyond what Python writes": ({"threads": 10**5000}, DeviceError, ("threads is beyond 4,096",)),
    "a budget beyond what Python writes": ({"staging_bytes": -(10**5000)}, DeviceError, ("beyond 63 bits",)),
    "negative threads": ({"threads": -2}, DeviceError, ("threads is -2; at least 1",)),
    "no staging": ({"staging_bytes": 0}, DeviceError, ("staging_bytes is 0; at least 1,048,576",)),
    "too little staging": ({"staging_bytes": (1 << 20) - 1}, DeviceError, ("1,048,575; at least 1,048,576",)),
    "negative staging": ({"staging_bytes": -1}, DeviceError, ("staging_bytes is -1; at least",)),
    "a device that is none": ({"device": "gpu"}, DeviceError, ("device 'gpu' can't be used here",)),
    "a device whose package is absent": (
        {"device": "privateuseone"},
        DeviceError,
        ("device 'privateuseone' can't be used here",),
    ),
    "a device of too many digits": ({"device": 2**70}, DeviceError, ("can't be used here",)),
    "an empty device": ({"device": ""}, DeviceError, ("device '' can't be used here",)),
    "a device that isn't there": ({"device": "cuda:97"}, DeviceError, ("device 'cuda:97' can't be used here",)),
    "an unknown dtype": ({"dtype": "bfloat17"}, RecipeError, ("dtype must be a torch dtype",)),
    "the name of something else in torch": ({"dtype": "nn"}, RecipeError, ("dtype must be a torch dtype",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_option_that_cannot_be_honoured_is_explained(case: str, llama: Path) -> None:
    options, error, says = OPTIONS[case]
    fails(error, says, lambda: octavo.load(llama, **options))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"format": ["fp8"]}, RecipeError, "unknown format ['fp8']"),
        ({"format": None}, RecipeError, "unknown format None"),
        ({"staging_bytes": "1MiB"}, DeviceError, "staging_bytes is '1MiB', not a number of bytes"),
        ({"staging_bytes": 1.5e9}, DeviceError, "not a number of bytes"),
        ({"staging_bytes": 5}, DeviceError, "staging_bytes is 5; at least"),
    ],
)
def test_option_of_a_plan_that_is_none_is_explained(
    options: dict[str, Any], error: type[OctavoError], says: str, llama: Path
) -> None:
    fails(error, says, lambda: octavo.plan(llama, model=False, **options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(
            {"device": "meta"},
            "meta",
            id="meta device",
        ),
        pytest.param(
            {"revision": "main"},
            "revision",
            id="revision",
        ),
        pytest.param({"dtype": torch.int8}, "int8", id="int8 dtype"),
        pytest.param(
            {"dtype": torch.float8_e4m3fn},
            "float8",
            id="fp8 dtype",
        ),
        pytest.param(
            {"attn_implementation": "nosuch"},
            "nosuch",
            id="attention",
        ),
        pytest.param(
            {"scheme": {"targets": ["*.mlp.*"]}},
            "targets",
            id="targets as a list",
        ),
        pytest.param(
            {"threads": 700, "staging_bytes": 1 << 20},
            "700 threads need staging_bytes of at least",
            id="more threads than staging allows",
        ),
    ],
)
def test_option_that_cannot_be_honoured_is_an_error_of_octavo(options: dict[str, Any], says: str, llama: Path) -> None:
    with pytest.raises(OctavoError, match=says):
        octavo.load(llama, **options)


# -- the route through from_pretrained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheme": "fp9"}, "unknown scheme 'fp9'"),
        ({"skip": ["x"]}, "unknown option 'skip'"),
        pytest.param(
            {"ignore": "lm_head"},
            "ignore must be a list",
        ),
        ({"ignore": ["re:("]}, "no regular expression"),
        ({"targets": 5}, "targets must be patterns and their schemes"),
        ({"weights": [1]}, "weights must map names to [scheme, parts]"),
    ],
)
def test_octavo_config_that_is_wrong_is_refused_when_made(options: dict[str, Any], says: str) -> None:
    fails(RecipeError, says, lambda: octavo.OctavoConfig(**options))


@pytest.mark.parametrize(
    ("options", "kwargs", "error", "says"),
    [
        ({"ignore": ["*.mlpp.*"]}, {}, RecipeError, "'*.mlpp.*' matches no tensor"),
        ({"staging_bytes": 5}, {}, DeviceError, "staging_bytes is 5"),
        ({"threads": 0}, {}, DeviceError, "threads is 0"),
        ({}, {"device_map": {"": "disk"}}, DeviceError, "has the whole model on disk"),
    ],
    ids=["ignore without a match", "too little staging", "no threads", "disk"],
)
def test_octavo_config_that_cannot_be_honoured_is_explained(
    options: dict[str, Any], kwargs: dict[str, Any], error: type[OctavoError], says: str, llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = octavo.OctavoConfig(**options)
    fails(error, says, lambda: AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, **kwargs))
