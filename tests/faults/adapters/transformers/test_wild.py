"""Checkpoints as they lie about: every way to read them makes the same of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import INDEX, MODEL, edit_config, fails, split_in_two
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import octavo
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError, CoverageError, OctavoError, RecipeError

WAYS: dict[str, Callable[[Path, Path], Any]] = {
    "plan": lambda folder, _: octavo.plan(folder, model=True),
    "plan of a conversion": lambda folder, _: octavo.plan(folder, model=False),
    "convert": lambda folder, dst: octavo.convert(folder, dst / "converted"),
    "stream": lambda folder, _: dict(octavo.stream(folder)),
    "load": lambda folder, _: octavo.load(folder),
    "OctavoConfig": lambda folder, _: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=octavo.OctavoConfig()
    ),
}


def rewritten(
    folder: Path, rename: Callable[[str], str], change: Callable[[str, Tensor], Tensor] | None = None
) -> Path:
    tensors = load_file(folder / MODEL)
    made = {rename(name): change(name, tensor) if change else tensor for name, tensor in tensors.items()}
    save_file(made, folder / MODEL, metadata={"format": "pt"})
    return folder


def states(folder: Path, dst: Path) -> list[Mapping[str, Tensor]]:
    """What becomes of a checkpoint by way of each reader."""
    dst.mkdir(exist_ok=True)
    octavo.convert(folder, dst / "out")
    configured = AutoModelForCausalLM.from_pretrained(folder, quantization_config=octavo.OctavoConfig())
    converted = load_file(dst / "out" / MODEL)
    return [converted, dict(octavo.stream(folder)), octavo.load(folder).state_dict(), configured.state_dict()]


# -- names of wrappers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name.replace('self_attn', '_checkpoint_wrapped_module.self_attn')}",
    ],
)
def test_names_of_wrappers_change_nothing(rename: Callable[[str], str], llama: Path, tmp_path: Path) -> None:
    sound = states(llama, tmp_path / "sound")
    wrapped = states(rewritten(llama, rename), tmp_path)
    for there, here in zip(sound, wrapped, strict=True):
        assert there.keys() == here.keys()
        for name, tensor in there.items():
            assert torch.equal(tensor.view(torch.uint8), here[name].view(torch.uint8)), name
    report = octavo.convert(llama, tmp_path / "again")
    assert any("of a wrapper, left out of the names" in note for note in report.notes)
    assert octavo.verify(tmp_path / "again", against=llama).ok


def test_another_prefix_is_named(llama: Path, tmp_path: Path) -> None:
    rewritten(llama, lambda name: f"net.{name}")
    for way in ("plan", "load", "OctavoConfig"):
        says = ("Names begin with 'net.': without it,", "of them are the model's")
        fails(CoverageError, says, lambda way=way: WAYS[way](llama, tmp_path))
    report = octavo.convert(llama, tmp_path / "out")
    assert any("not proved" in note and "Names begin with 'net.'" in note for note in report.notes)


# -- refused in every way ---------------------------------------------------------------------------------------------


def _two(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "kept")
    split_in_two(folder)
    (folder / "kept").rename(folder / MODEL)


def _beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def _packed(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    module, shape = name.removesuffix(".weight"), tensors.pop(name).shape
    packed = {"qweight": torch.zeros(shape[1] // 8, shape[0], dtype=torch.int32), "scales": torch.ones(1, shape[0])}
    save_file({**tensors, **{f"{module}.{leaf}": t for leaf, t in packed.items()}}, folder / MODEL)


def _modelopt(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')


REFUSED: dict[str, tuple[Callable[[Path], None], type[OctavoError], tuple[str, ...]]] = {
    "two checkpoints": (_two, CheckpointError, ("holds two checkpoints", MODEL, INDEX)),
    "an adapter beside a model": (_beside, CheckpointError, ("an adapter of peft", "adapter_config.json")),
    "packed integers": (_packed, RecipeError, ("already quantized (packed weights, though", "qweight (I32) beside")),
    "ModelOpt's": (_modelopt, RecipeError, ("already quantized (FP8, says its hf_quant_config.json)",)),
    "compression_config": (
        lambda folder: edit_config(folder, compression_config={"format": "x"}) and None,
        RecipeError,
        ("already quantized (x, says compression_config in its config.json)",),
    ),
}


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_every_way(case: str, llama: Path, tmp_path: Path) -> None:
    change, kind, says = REFUSED[case]
    change(llama)
    for act in WAYS.values():
        fails(kind, says, lambda act=act: act(llama, tmp_path))
    assert not (tmp_path / "converted").exists()


# -- an index that disagrees ------------------------------------------------------------------------------------------


def edit_index(folder: Path, **names: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update({name: file or min(index["weight_map"].values()) for name, file in names.items()})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("way", WAYS)
def test_an_index_with_a_leftover_is_read_in_every_way(way: str, llama: Path, tmp_path: Path) -> None:
    split_in_two(llama)
    edit_index(llama, **{"mtp.fc.weight": None})
    WAYS[way](llama, tmp_path)
    assert any("names tensors that no shard holds: mtp.fc.weight" in note for note in octavo.plan(llama).notes)


def test_a_tensor_that_only_the_index_has_and_the_model_needs_is_missed(llama: Path, tmp_path: Path) -> None:
    split_in_two(llama)
    shard = max(llama.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors.pop(name)
    save_file(tensors, shard, metadata={"format": "pt"})
    for way in ("load", "OctavoConfig", "plan"):
        fails(CoverageError, ("missing", name), lambda way=way: WAYS[way](llama, tmp_path))
    says = (f"the index names tensors that no shard holds ({name})", "the checkpoint is incomplete")
    fails(CoverageError, says, lambda: octavo.convert(llama, tmp_path / "out"))


def test_a_stale_index_gives_way_in_every_way(llama: Path, tmp_path: Path) -> None:
    sound = states(llama, tmp_path / "sound")
    (llama / INDEX).write_text(json.dumps({"weight_map": {"old": "model-00001-of-00009.safetensors"}}))
    assert [state.keys() for state in states(llama, tmp_path)] == [state.keys() for state in sound]
    assert not (tmp_path / "out" / INDEX).exists()


def test_fp8_that_stands_for_its_numbers_is_carried(llama: Path, tmp_path: Path) -> None:
    rewritten(llama, lambda name: name, lambda name, t: t.to(torch.float8_e4m3fn) if "up_proj" in name else t)
    assert Checkpoint.open(llama).quantization is None
    octavo.convert(llama, tmp_path / "out")
    model, meant = LlamaForCausalLM.from_pretrained(tmp_path / "out"), load_file(llama / MODEL)
    for name, tensor in meant.items():
        if "up_proj" in name:
            assert torch.equal(model.get_parameter(name).float(), tensor.float())
