"""Folders that look like a model's: adapters, pipelines, folders of folders. They are called what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _inputs import MODEL, fails, write_tensors

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_weight_is_read")

LORA = [f"base_model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB"]


def adapter(folder: Path, config: str = '{"base_model_name_or_path": "org/base", "peft_type": "LORA"}') -> Path:
    write_tensors(folder / "adapter_model.safetensors", *LORA)
    (folder / "adapter_config.json").write_text(config)
    return folder


def test_an_adapter_is_refused_with_its_model_named(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    says = (
        "an adapter of peft, not a model",
        "adapter_config.json says that it belongs to 'org/base'",
        "Merge it into",
    )
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize("config", ["{}", "[]", "no JSON", '{"base_model_name_or_path": null}'])
def test_an_adapter_of_an_unknown_model_is_refused_too(config: str, tmp_path: Path) -> None:
    fails(CheckpointError, "an adapter of peft", lambda: Checkpoint.open(adapter(tmp_path, config)))


def test_an_adapter_in_a_pickle_is_an_adapter_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(CheckpointError, ("an adapter of peft", "merge_and_unload"), lambda: Checkpoint.open(tmp_path))


def test_an_adapter_without_its_config_is_known_by_its_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "lora.safetensors", *LORA)
    says = ("an adapter of peft", LORA[0], "base_model.model.")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path / "lora.safetensors"))


def test_a_model_and_an_adapter_are_both_named(tmp_path: Path) -> None:
    write_tensors(adapter(tmp_path) / MODEL, "a")
    says = (f"holds a model ({MODEL}) and an adapter", "adapter_model.safetensors", f"or give {tmp_path / MODEL}")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))
    fails(CheckpointError, says, lambda: Checkpoint.open_chosen([tmp_path / MODEL]))
    assert set(Checkpoint.open(tmp_path / MODEL).tensors) == {"a"}


def test_a_config_of_an_adapter_that_has_been_merged_is_nothing_to_refuse(tmp_path: Path) -> None:
    write_tensors(adapter(tmp_path) / MODEL, "a")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert set(Checkpoint.open(tmp_path).tensors) == {"a"}


def test_a_pipeline_is_told_by_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("transformer", "vae"):
        write_tensors(tmp_path / part / "diffusion_pytorch_model.safetensors", "a")
    (tmp_path / "scheduler").mkdir()
    says = ("a pipeline of several models (model_index.json, of diffusers)", "one of them: transformer and vae")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))
    write_tensors(tmp_path / "all_in_one.safetensors", "a")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))
    assert set(Checkpoint.open(tmp_path / "vae").tensors) == {"a"}


def test_a_model_in_a_folder_that_modules_json_names_is_pointed_to(tmp_path: Path) -> None:
    write_tensors(tmp_path / "0_Transformer" / MODEL, "a")
    write_tensors(tmp_path / "2_Dense" / MODEL, "a")
    entries = [{"idx": i, "path": path} for i, path in enumerate(["0_Transformer", "1_Pooling", "2_Dense"])]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    says = ("modules.json", "the model is in 0_Transformer: give", str(tmp_path / "0_Transformer"))
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize("below", ["checkpoint-500", "models--org--name/snapshots/1a2b"])
def test_checkpoints_in_folders_below_are_pointed_to(below: str, tmp_path: Path) -> None:
    folder = tmp_path / below
    write_tensors(folder / MODEL, "a")
    root = tmp_path if "/" not in below else folder.parents[1]
    says = ("no .safetensors file here", f"There are some in folders below: give {folder}")
    fails(CheckpointError, says, lambda: Checkpoint.open(root))


@pytest.mark.parametrize(("name", "says"), [("zero_to_fp32.py", "DeepSpeed"), (".metadata", "distributed.checkpoint")])
def test_checkpoints_in_parts_are_told_by_who_made_them(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / "__0_0.distcp").touch()
    fails(CheckpointError, ("no .safetensors file here", says), lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize("content", ["{}", "no JSON", '[1, {"path": 2}, {"path": "../.."}, {}]', "[[[["])
def test_a_modules_json_of_something_else_changes_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    fails(CheckpointError, ("no .safetensors file here", "Give a folder with"), lambda: Checkpoint.open(tmp_path))
