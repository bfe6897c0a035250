"""Recipes: what a pattern matches, what stays by default, and what is an error."""

from __future__ import annotations

import json

import pytest
import torch

from octavo.errors import RecipeError
from octavo.planning import kinds
from octavo.planning.recipe import Recipe, Weight, matching


def linear(name: str, *sources: str, dtype: torch.dtype | None = torch.bfloat16, **options) -> Weight:
    return Weight(name, sources or (name,), dtype, options.pop("kind", kinds.LINEAR), **options)


MODEL = [
    linear("model.embed_tokens.weight"),
    linear("model.layers.0.self_attn.q_proj.weight"),
    linear("model.layers.0.mlp.down_proj.weight"),
    linear("model.layers.0.mlp.gate.weight"),
    Weight(
        "model.layers.0.mlp.experts.gate_up_proj", ("e.0.gate.weight", "e.0.up.weight"), torch.bfloat16, kinds.EXPERTS
    ),
    Weight("model.norm.weight", ("model.norm.weight",), torch.bfloat16, "vector"),
    linear("lm_head.weight"),
]


def schemes_of(recipe: Recipe, weights=MODEL) -> dict[str, str | None]:
    return {name.removeprefix("model.layers.0."): d.scheme for name, d in recipe.decide(weights).items()}


def test_the_default_quantizes_linear_layers_and_experts_only():
    assert schemes_of(Recipe()) == {
        "model.embed_tokens.weight": None,
        "self_attn.q_proj.weight": "fp8_channel",
        "mlp.down_proj.weight": "fp8_channel",
        "mlp.gate.weight": None,
        "mlp.experts.gate_up_proj": "fp8_channel",
        "model.norm.weight": None,
        "lm_head.weight": None,
    }


def test_every_decision_says_why():
    decisions = Recipe(ignore=["*.q_proj"], targets={"*.down_proj": "mxfp8"}).decide(MODEL)
    assert {name.split(".")[-2]: d.reason for name, d in decisions.items()} == {
        "embed_tokens": "embedding, kept by default",
        "q_proj": "ignored by '*.q_proj'",
        "down_proj": "target '*.down_proj'",
        "gate": "MoE router, kept by default",
        "experts": "experts",
        "norm": "norm",
        "lm_head": "output head, kept by default",
    }


@pytest.mark.parametrize(
    ("module", "is_head"),
    [
        ("score.0", True),  # of rewards, in Qwen2.5-Math-RM
        ("score.out_proj", True),
        ("v_head.summary", True),
        ("classifier.dense", True),
        ("classification_head.out_proj", True),
        ("pre_classifier", True),
        ("qa_outputs.start_logits.dense", True),
        ("bert.pooler.dense", True),
        ("sequence_summary.summary", True),
        ("head.dense", True),
        ("encoder.layer.0.output.dense", False),
        ("model.layers.0.score.0", False),
        ("proj_out", True),
        ("single_transformer_blocks.0.proj_out", False),
        ("layers.0.attention.output", False),
        ("model.layers.61.shared_head.head", True),
        ("cls.predictions.transform.dense", True),
        ("cls.seq_relationship", True),
        ("cls.layers.0.fc1", False),
        ("action_head.model.layers.0.self_attn.q_proj", False),  # a model of its own
        ("classifier.model.up_proj", False),
        ("model.layers.0.mlp.down_proj", False),
        ("visual.merger.mlp.0", False),
        ("vision_model.head.mlp.fc1", False),
    ],
)
def test_heads_stay_with_all_that_they_hold(module: str, is_head: bool) -> None:
    weight = Weight(f"{module}.weight", (), torch.bfloat16, kinds.LINEAR)
    (decision,) = Recipe().decide([weight]).values()
    assert (decision.reason == "output head, kept by default") == is_head
    assert (decision.scheme is None) == is_head


def test_without_a_scheme_only_targets_are_quantized():
    found = schemes_of(Recipe(None, targets={"re:.*experts": "fp8_block"}))
    assert {name for name, scheme in found.items() if scheme} == {"mlp.experts.gate_up_proj"}
    assert found["mlp.experts.gate_up_proj"] == "fp8_block"
    down = "model.layers.0.mlp.down_proj.weight"
    assert Recipe(None, targets={"re:.*experts": "fp8_block"}).decide(MODEL)[down].reason == "no target matches"
    assert Recipe(None).decide(MODEL)[down].reason == "no scheme is asked for"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("*.q_proj", True),
        ("*.q_proj.weight", True),
        ("model.*.q_proj", True),  # a star crosses dots
        ("*q_proj*", True),
        ("model.layers.?.self_attn.[qk]_proj", True),
        ("q_proj", False),
        ("model.layers.0", True),
        ("model.layers.0.self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers", True),
        ("model.layer", False),  # a plain name ends at a dot
        ("re:model\\.layers\\.\\d+\\.self_attn", True),
        ("re:.*q_proj$", True),  # also without .weight
        ("re:self_attn", False),  # from the beginning of the name
    ],
)
def test_patterns_match_as_documented(pattern, matches):
    weight = MODEL[1]
    assert bool(matching([pattern], [weight.name])) == matches
    if matches:
        assert Recipe(ignore=[pattern]).decide([weight])[weight.name].scheme is None
    else:
        with pytest.raises(RecipeError, match="matches no tensor"):
            Recipe(ignore=[pattern]).decide([weight])


def test_patterns_match_the_names_of_sources_too():
    weight = linear("qkv.weight", "q.weight", "k.weight", "v.weight")
    assert Recipe(ignore=["?.weight"]).decide([weight])["qkv.weight"].scheme is None


def test_a_full_name_overrides_what_stays_by_default():
    assert schemes_of(Recipe(targets={"lm_head": "fp8_tensor"}))["lm_head.weight"] == "fp8_tensor"
    assert schemes_of(Recipe(targets={"lm_head.weight": "fp8_tensor"}))["lm_head.weight"] == "fp8_tensor"


def test_a_pattern_does_not_override_what_stays_by_default():
    found = schemes_of(Recipe(targets={"*": "fp8_block"}))
    assert found["lm_head.weight"] is None
    assert found["mlp.gate.weight"] is None
    assert found["mlp.down_proj.weight"] == "fp8_block"


def test_a_pattern_that_matches_only_what_stays_by_default_is_an_error():
    with pytest.raises(RecipeError, match="'re:lm_head' matches only weights that can't be quantized, or stay"):
        schemes_of(Recipe(targets={"re:lm_head": "fp8_block"}))


def test_a_weight_can_be_kept_for_what_the_model_knows_of_it():
    weight = linear("a.special.weight", keep="tied to the embedding")
    assert Recipe().decide([weight])["a.special.weight"].reason == "tied to the embedding, kept by default"


def test_ignore_beats_a_pattern_in_targets():
    found = schemes_of(Recipe(targets={"*.mlp.*": "fp8_block"}, ignore=["*.down_proj"]))
    assert found["mlp.down_proj.weight"] is None
    assert found["mlp.experts.gate_up_proj"] == "fp8_block"


# -- errors -----------------------------------------------------------------------------------------------------------


def test_ignoring_and_targeting_a_full_name_is_an_error():
    with pytest.raises(RecipeError, match="both ignored by '\\*' and targeted by 'lm_head'"):
        Recipe(targets={"lm_head": "fp8_block"}, ignore=["*"]).decide(MODEL)


def test_two_targets_of_different_schemes_are_an_error():
    with pytest.raises(RecipeError, match="different schemes: '\\*mlp\\*' -> fp8_block, '\\*down_proj' -> mxfp8"):
        Recipe(targets={"*mlp*": "fp8_block", "*down_proj": "mxfp8"}).decide([MODEL[2]])


def test_two_targets_of_the_same_scheme_agree():
    assert schemes_of(Recipe(None, {"*mlp*": "mxfp8", "*down_proj": "mxfp8"}), [MODEL[2]]) == {
        "mlp.down_proj.weight": "mxfp8"
    }


def test_a_pattern_without_a_match_is_an_error_that_names_the_nearest():
    with pytest.raises(RecipeError, match=r"'lm_hed\.weight' matches no tensor; the nearest name is 'lm_head\.weight'"):
        Recipe(ignore=["lm_hed.weight"]).decide(MODEL)


def test_a_pattern_that_names_some_sources_of_a_parameter_is_an_error():
    with pytest.raises(
        RecipeError, match=r"one parameter made of 2 tensors, .* matches e\.0\.up\.weight but not e\.0\.gate"
    ):
        Recipe(ignore=["*.up.weight"]).decide(MODEL)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (linear("a.weight", dtype=torch.int8), "int8, not bf16, fp16 or fp32"),
        (linear("a.weight", dtype=None), "a dtype that torch lacks"),
        (linear("a.weight", kind="vector"), "vector"),
    ],
)
def test_a_target_that_cannot_be_quantized_is_an_error(weight, why):
    assert Recipe().decide([weight])["a.weight"].scheme is None
    with pytest.raises(RecipeError, match=f"a.weight: targeted by 'a', but can't be quantized: {why}"):
        Recipe(targets={"a": "fp8_block"}).decide([weight])


def test_all_problems_come_in_one_message():
    recipe = Recipe(targets={"lm_head": "fp8_block", "*q_proj": "mxfp8", "*self_attn*": "fp8_block"}, ignore=["lm_*"])
    with pytest.raises(RecipeError, match="recipe: 2 problems") as caught:
        recipe.decide(MODEL)
    assert "lm_head.weight: both ignored" in str(caught.value)
    assert "different schemes" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Recipe("fp9"), "unknown scheme 'fp9'"),
        (lambda: Recipe(targets={"a": "fp9"}), "unknown scheme 'fp9'"),
        (lambda: Recipe(ignore=["re:("]), "is no regular expression"),
        (lambda: Recipe(ignore=[""]), "an empty pattern"),
        (lambda: Recipe(ignore="lm_head"), "must be a list of patterns, not the text 'lm_head'"),
        (
            lambda: Recipe.from_dict({"schema": "fp8_block"}),
            "unknown recipe key 'schema'; known: scheme, targets, ignore",
        ),
    ],
)
def test_what_can_be_told_at_once_is_told_at_once(make, text):
    with pytest.raises(RecipeError, match=text):
        make()


def test_an_empty_scheme_name_is_unknown_too():
    with pytest.raises(RecipeError, match="unknown scheme ''"):
        Recipe("")


def test_an_empty_scheme_name_of_a_target_is_unknown_too():
    with pytest.raises(RecipeError, match="unknown scheme ''"):
        Recipe(targets={"a": ""})


def test_targets_that_are_no_pairs_are_a_recipe_error():
    with pytest.raises(RecipeError):
        Recipe(targets="lm_head")


# -- forms ------------------------------------------------------------------------------------------------------------


def test_a_recipe_survives_json():
    recipe = Recipe("fp8_block", {"*a*": "mxfp8"}, ["b", "re:c"])
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_coerce_takes_every_form_of_a_scheme():
    assert Recipe.coerce("mxfp8") == Recipe("mxfp8")
    assert Recipe.coerce(None) == Recipe(None)
    assert Recipe.coerce({"scheme": "mxfp8", "ignore": ["a"]}) == Recipe("mxfp8", ignore=["a"])
    assert Recipe.coerce(Recipe("mxfp8", ignore=["a"]), ["b"]) == Recipe("mxfp8", ignore=["a", "b"])
    assert Recipe.coerce("mxfp8", "b") == Recipe("mxfp8", ignore=["b"])


def test_recipes_are_values():
    assert Recipe() == Recipe("auto") != Recipe("fp8_channel")
    assert Recipe().schemes == ("fp8_channel",)
    assert hash(Recipe(ignore=["a"])) == hash(Recipe(ignore=("a",)))
    with pytest.raises(AttributeError):
        Recipe().scheme = "mxfp8"
