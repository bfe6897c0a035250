"""Names of wrappers and of adapters."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import headers
from octavo.checkpoint.names import check_no_adapter, unwrapped
from octavo.errors import CheckpointError

LLAMA = {"model_type": "llama"}


def names(*given: str, config: dict[str, Any] = LLAMA) -> tuple[list[str], str, list[str]]:
    problems: list[str] = []
    found, notes = unwrapped(headers(dict.fromkeys(given, (2, 2))).tensors, config, problems)
    assert [info.name for info in found.values()] == list(found)
    return list(found), "\n".join(notes), problems


def test_names_of_a_model_stay() -> None:
    given = ["model.embed.weight", "model.module.weight", "orig_mod.x", "a._orig_mod"]
    assert names(*given) == (given, "", [])


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrapper_of_torch_is_left_out_wherever_it_stands(wrapper: str) -> None:
    found, notes, _ = names(f"{wrapper}.a.weight", f"{wrapper}.layers.0.{wrapper}.b.weight", "layers.1.b.weight")
    assert found == ["a.weight", "layers.0.b.weight", "layers.1.b.weight"]
    assert notes == f"'{wrapper}.', of a wrapper, left out of the names: {wrapper}.a.weight is read as a.weight"


def test_wrappers_in_wrappers_are_left_out() -> None:
    found, notes, _ = names("module._orig_mod._fsdp_wrapped_module.a", "module._orig_mod.b")
    assert found == ["a", "b"]
    assert "'_fsdp_wrapped_module.' and '_orig_mod.' and 'module.', of a wrapper" in notes


def test_a_prefix_that_all_names_share_is_left_out_if_the_config_names_a_model() -> None:
    assert names("module.a", "module.b")[0] == ["a", "b"]
    assert names("module.a", "b")[0] == ["module.a", "b"]


@pytest.mark.parametrize("config", [{}, {"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}}])
def test_a_prefix_that_may_be_the_model_s_own_is_named_and_stays(config: dict[str, Any]) -> None:
    found, notes, _ = names("module.a", "module.b", config=config)
    assert found == ["module.a", "module.b"]
    assert "all names begin with 'module.', as of a model saved through DistributedDataParallel" in notes


def test_two_tensors_that_become_one_are_a_problem() -> None:
    assert names("_orig_mod.a", "a")[2] == [
        "'_orig_mod.a' and 'a' are one tensor, but for the name of a wrapper: keep one of them"
    ]


ADAPTERS = {
    "of peft": [f"base_model.model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB"],
    "of peft, with a head": ["base_model.model.x.lora_A.weight", "base_model.model.score.weight"],
    "with a name": ["layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"],
    "of another prefix": ["transformer.blocks.0.q.lora_A.weight", "transformer.blocks.0.q.lora_B.weight"],
    "of a trainer of diffusion models": [
        "lora_unet_x.lora_down.weight",
        "lora_unet_x.lora_up.weight",
        "lora_unet_x.alpha",
    ],
    "DoRA": ["x.lora_A.weight", "x.lora_B.weight", "x.lora_magnitude_vector"],
    "LoHa": ["x.hada_w1_a", "x.hada_w1_b", "x.alpha"],
    "a model with one inside": ["base_model.model.x.base_layer.weight", "base_model.model.x.lora_A.default.weight"],
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_are_refused_by_their_names(case: str) -> None:
    with pytest.raises(CheckpointError, match=r"^f: (an adapter|a model that peft).*merge_and_unload"):
        check_no_adapter("f", ADAPTERS[case])


def test_it_is_no_scalar_that_shows_an_adapter() -> None:
    with pytest.raises(CheckpointError, match=r"are like x\.lora_down\.weight\. "):
        check_no_adapter("f", ["x.alpha", "x.lora_down.weight", "x.lora_up.weight"])


def test_models_with_adapters_of_their_own_pass() -> None:
    check_no_adapter("f", ["model.q.base_layer.weight", "model.q.lora_A.speech.weight", "model.norm.weight"])
    check_no_adapter("f", ["x.parametrizations.weight.0.lora_A", "x.parametrizations.weight.original", "x.norm.weight"])
    check_no_adapter("f", ["x.alpha", "x.scale"])
    check_no_adapter("f", [])
