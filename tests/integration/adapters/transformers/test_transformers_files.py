"""Models saved and loaded again, and checkpoints cut into files in any way: the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _models import ARCHITECTURES, Checkpoints, by_architecture, by_case, by_scheme, logits
from transformers import AutoModelForCausalLM

import octavo
from helpers import same_bytes
from helpers.folders import split_shards, tensors_of
from helpers.models import differences
from octavo.errors import RecipeError
from octavo.running.modules import quantized_weights, scale_name

# -- saving and loading again -----------------------------------------------------------------------------------------


@by_case(ARCHITECTURES)
def test_saved_model_loads_again_bit_equal(
    checkpoints: Checkpoints, architecture: str, scheme: str, tmp_path: Path
) -> None:
    model = checkpoints.load(architecture, scheme)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert differences(model, again) == []
    assert sorted(quantized_weights(model)) == sorted(quantized_weights(again))
    assert torch.equal(logits(model), logits(again))


@by_architecture
def test_model_saved_after_from_pretrained_loads_again_bit_equal(
    checkpoints: Checkpoints, architecture: str, tmp_path: Path
) -> None:
    config = octavo.OctavoConfig("fp8_block")
    model = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture), quantization_config=config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert differences(model, again) == []
    again.save_pretrained(tmp_path / "twice")
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) == []


def test_model_saved_in_several_shards_loads_again_bit_equal(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints.load("qwen2_moe", "fp8_channel")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path)) == []


def test_unquantized_model_saves_what_it_was_loaded_from(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints.folder("llama")
    octavo.load(source, scheme=None).save_pretrained(tmp_path)
    before, after = tensors_of(source), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)


@by_case(ARCHITECTURES)
def test_saved_model_loads_again_through_octavo(
    checkpoints: Checkpoints, architecture: str, scheme: str, tmp_path: Path
) -> None:
    model = checkpoints.load(architecture, scheme)
    model.save_pretrained(tmp_path)
    again = octavo.load(tmp_path)
    assert differences(model, again) == []
    assert sorted(quantized_weights(model)) == sorted(quantized_weights(again))
    again.save_pretrained(tmp_path / "twice")
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path / "twice")) == []


@by_scheme
def test_fp8_weights_and_scales_take_no_gradients_however_they_came(
    checkpoints: Checkpoints, scheme: str, tmp_path: Path
) -> None:
    folder, config = checkpoints.folder("qwen2_moe"), octavo.OctavoConfig(scheme)
    model = checkpoints.load("qwen2_moe", scheme)
    model.save_pretrained(tmp_path)
    quantized = {name for weight, *_ in quantized_weights(model) for name in (weight, scale_name(weight))}
    expected = {name: name not in quantized for name, _ in model.named_parameters()}
    for found in (
        model,
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config),
        octavo.load(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert {name: parameter.requires_grad for name, parameter in found.named_parameters()} == expected


# -- files ------------------------------------------------------------------------------------------------------------


def test_single_file_path_loads_like_its_folder(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("llama")
    assert differences(octavo.load(folder / "model.safetensors"), checkpoints.load("llama", "fp8_channel")) == []


def test_path_may_be_a_string(checkpoints: Checkpoints) -> None:
    model = octavo.load(str(checkpoints.folder("llama")))
    assert differences(model, checkpoints.load("llama", "fp8_channel")) == []


@by_architecture
def test_sharded_checkpoint_loads_like_a_single_file(
    checkpoints: Checkpoints, architecture: str, tmp_path: Path
) -> None:
    source = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture))
    source.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = octavo.load(tmp_path, "fp8_block")
    assert differences(model, checkpoints.load(architecture, "fp8_block")) == []


@by_scheme
def test_layer_split_over_shards_loads_like_a_single_file(
    checkpoints: Checkpoints, scheme: str, tmp_path: Path
) -> None:
    # gate and up of the same expert, and neighbouring experts, in different files, out of order
    def shard_of(name: str) -> int:
        return 2 if "up_proj" in name else sum(map(ord, name)) % 2

    folder = split_shards(checkpoints.folder("qwen2_moe"), tmp_path, shard_of, 3)
    direct = checkpoints.load("qwen2_moe", scheme)
    assert differences(octavo.load(folder, scheme), direct) == []
    config = octavo.OctavoConfig(scheme)
    assert differences(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), direct) == []


def test_shards_without_an_index_load_when_their_numbers_are_complete(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = split_shards(checkpoints.folder("llama"), tmp_path, lambda name: len(name) % 2, 2)
    (folder / "model.safetensors.index.json").unlink()
    assert differences(octavo.load(folder), checkpoints.load("llama", "fp8_channel")) == []


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_a_mapping_of_names_that_would_be_passed_over_is_refused(
    checkpoints: Checkpoints, device_map: str | None
) -> None:
    def load(key_mapping: dict[str, str] | None) -> Any:
        how = {"quantization_config": octavo.OctavoConfig(), "key_mapping": key_mapping, "device_map": device_map}
        return AutoModelForCausalLM.from_pretrained(checkpoints.folder("llama"), **how)

    with pytest.raises(RecipeError, match=r"key_mapping, by which (\S+)k_proj.weight would be \1v_proj.weight"):
        load({"k_proj": "v_proj", "v_proj": "k_proj"})
    assert differences(load({"no such": "name"}), load(None)) == []
