"""What ``save_pretrained`` wrote of a quantized model: other classes take it, and what is missing of it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import octavo
from helpers.models import differences, state_of
from octavo.errors import CheckpointError, CoverageError

pytest.importorskip("transformers")

from _models import make_checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

SCHEMES = ("fp8_block", "int8_channel", "nvfp4")
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    return make_checkpoint("llama", tmp_path_factory.mktemp("plain") / "llama", **sizes)


def saved(plain: Path, scheme: str, folder: Path, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    config = octavo.OctavoConfig(scheme, **options)
    model = cls.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_model_is_loaded_from_one_with_a_head(scheme: str, plain: Path, tmp_path: Path) -> None:
    whole = saved(plain, scheme, tmp_path / "whole", ignore=["*.self_attn.*"])
    model = AutoModel.from_pretrained(tmp_path / "whole")
    assert differences(model, whole.model) == []
    assert differences(octavo.load(tmp_path / "whole", strict=False, model_class=AutoModel), whole.model) == []
    model.save_pretrained(tmp_path / "base")
    assert differences(octavo.load(tmp_path / "base"), whole.model) == []
    tokens = torch.arange(24)[None]
    assert torch.equal(model(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_base_model_is_given_a_head(scheme: str, plain: Path, tmp_path: Path) -> None:
    base = saved(plain, scheme, tmp_path, AutoModel)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert differences(model.model, base) == []
    assert 0.01 < model.score.weight.std() < 0.03  # as transformers initialises it


def test_a_quantized_head_that_a_class_lacks_is_passed_over(plain: Path, tmp_path: Path) -> None:
    options = {"targets": {"lm_head.weight": "int8_channel"}}
    whole = saved(plain, "fp8_channel", tmp_path, **options)
    assert whole.lm_head.weight.dtype == torch.int8
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert differences(model.model, whole.model) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gone", ["", "_scale"])
def test_what_is_missing_of_a_quantized_weight_is_named(gone: str, scheme: str, plain: Path, tmp_path: Path) -> None:
    saved(plain, scheme, tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(f"{UP}{gone}"))
    with pytest.raises(CoverageError, match=rf"missing: {UP}{gone} \[.* of {scheme}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "another shape": (
        lambda t: t.update({f"{UP}_scale": torch.ones(1, 1)}),
        rf"misshapen: {UP}_scale \[192, 1\], fp32 of fp8_channel, is \[1, 1\], F32",
    ),
    "e5m2": (
        lambda t: t.update({UP: t[UP].float().to(torch.float8_e5m2)}),
        rf"misshapen: {UP} \[192, 128\], e4m3fn .*, F8_E5M2 in the files",
    ),
    "bf16": (
        lambda t: t.update({UP: t[UP].bfloat16()}),
        rf"misshapen: {UP} \[192, 128\], e4m3fn .*, BF16 in the files",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("ignore", [True, False])
def test_what_is_in_another_form_is_named(kind: str, ignore: bool, plain: Path, tmp_path: Path) -> None:
    saved(plain, "fp8_channel", tmp_path)
    edit(tmp_path, WRONG[kind][0])
    with pytest.raises(CoverageError, match=WRONG[kind][1]):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
    with pytest.raises(CoverageError, match=WRONG[kind][1]):
        octavo.load(tmp_path)


def test_scales_that_were_saved_in_less_are_taken(plain: Path, tmp_path: Path) -> None:
    saved(plain, "fp8_channel", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({f"{UP}_scale": tensors[f"{UP}_scale"].bfloat16()}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert state_of(model)[f"{UP}_scale"].dtype == torch.float32
    assert differences(model, octavo.load(tmp_path)) == []


def test_numbers_of_which_the_config_lists_no_scheme_are_no_weights(plain: Path, tmp_path: Path) -> None:
    saved(plain, "fp8_channel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["weights"][UP]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoverageError, match=f"{UP} is F8_E4M3, and config.json lists no scheme for it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_vector_in_fp8_without_scales_is_no_weight_either(plain: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    saved(plain, "fp8_channel", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(octavo.schemes.FP8)}))
    with pytest.raises(CoverageError, match=f"{name} is F8_E4M3, and config.json lists no scheme for it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_weight_that_a_model_does_not_have_is_named(plain: Path, tmp_path: Path) -> None:
    saved(plain, "fp8_channel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    listed = config["quantization_config"]["weights"]
    listed[UP.replace("layers.0", "layers.7")] = listed[UP]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for cls in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(CheckpointError, match=r"does not fit the model: .*layers\.7\.mlp\.up_proj"):
            cls.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "auto", "attn_implementation": "eager"},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}, "low_cpu_mem_usage": True},
        {"quantization_config": octavo.OctavoConfig()},
    ],
    ids=["dtype", "auto", "device_map", "config"],
)
def test_habits_of_from_pretrained_keep_the_bytes_and_updates_go_on(
    options: dict[str, Any], scheme: str, plain: Path, tmp_path: Path
) -> None:
    first = saved(plain, scheme, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert differences(model, first) == []
    new = {name: (tensor * 1.5).to(tensor.dtype) for name, tensor in load_file(plain / "model.safetensors").items()}
    for each in (first, model):
        octavo.update(each, new)
    assert differences(model, first) == []
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path)) != []


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
