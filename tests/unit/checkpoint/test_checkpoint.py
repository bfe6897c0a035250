"""Checkpoints that are in order; what is wrong with a checkpoint is tested in tests/faults."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers import open_shards, random_weights, same_bytes, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import MissingExtraError, SourceChangedError


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": random_weights((7, 9), torch.bfloat16, 0),
        "b.weight": random_weights((5, 3, 2), torch.float32, 1),
        "c": torch.arange(11),
        "d": torch.tensor(1.5),
        "e": torch.empty(0, 4, dtype=torch.float16),
        "f": torch.tensor([True, False]),
    }


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor by its byte range alone."""
    info = checkpoint.tensors[name]
    data = checkpoint.shard_of(name).path.read_bytes()[info.offset : info.offset + info.nbytes]
    flat = torch.frombuffer(bytearray(data), dtype=info.dtype) if data else torch.empty(0, dtype=info.dtype)
    return flat.reshape(info.shape)


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bytes(read(checkpoint, name), tensor), name


@pytest.mark.parametrize("shards", [1, 2, 6])
def test_what_was_written_is_found_at_its_offsets(tmp_path, shards):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors(), shards, {"model_type": "llama"}))
    assert_holds(checkpoint, tensors())
    assert len(checkpoint.shards) == shards
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors().values())
    assert checkpoint.folder == tmp_path
    assert checkpoint.shards[0].metadata == {"format": "pt"}
    checkpoint.check_unchanged()


def test_opening_leaves_no_file_open(tmp_path):
    Checkpoint.open(write_checkpoint(tmp_path, tensors(), 2))
    assert open_shards() == []


def test_a_tensor_knows_its_dtype_and_shape(tmp_path):
    info = Checkpoint.open(write_checkpoint(tmp_path, tensors())).tensors["b.weight"]
    assert (info.dtype_name, info.dtype, info.shape, info.numel, info.nbytes) == (
        "F32",
        torch.float32,
        (5, 3, 2),
        30,
        120,
    )


def test_floats_of_16_and_32_bits_are_quantizable(tmp_path):
    infos = Checkpoint.open(write_checkpoint(tmp_path, tensors())).tensors
    assert {name for name, info in infos.items() if info.quantizable} == {"a.weight", "b.weight", "d", "e"}


def test_a_single_file_is_a_checkpoint(tmp_path):
    write_checkpoint(tmp_path, tensors(), config={"model_type": "llama"})
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert_holds(checkpoint, tensors())
    assert (checkpoint.folder, checkpoint.config["model_type"]) == (tmp_path, "llama")


def test_a_path_may_be_text(tmp_path):
    assert_holds(Checkpoint.open(str(write_checkpoint(tmp_path, tensors()))), tensors())


def test_a_lone_file_of_any_name_is_found_in_its_folder(tmp_path):
    save_file(tensors(), tmp_path / "weights.safetensors")
    assert_holds(Checkpoint.open(tmp_path), tensors())


def test_a_complete_set_of_shards_needs_no_index(tmp_path):
    write_checkpoint(tmp_path, tensors(), 3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(Checkpoint.open(tmp_path), tensors())


def test_the_index_decides_among_files(tmp_path):
    write_checkpoint(tmp_path, tensors(), 2)
    save_file({"other": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert_holds(Checkpoint.open(tmp_path), tensors())


def test_given_files_are_opened_without_an_index(tmp_path):
    write_checkpoint(tmp_path, tensors(), 3)
    checkpoint = Checkpoint.open_files([tmp_path / "model-00002-of-00003.safetensors"])
    assert set(checkpoint.tensors) == {"c", "d"}


def test_a_checkpoint_without_config_has_an_empty_one(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors()))
    assert checkpoint.config == {}
    assert checkpoint.quantization is None


def test_a_quantized_checkpoint_says_so(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq"}}
    found = Checkpoint.open(write_checkpoint(tmp_path, tensors(), config=config)).quantization
    assert found is not None
    assert found.method == "gptq"


def test_a_changed_file_is_noticed(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors(), 2))
    os.utime(checkpoint.shards[1].path, ns=(1, 1))
    with pytest.raises(SourceChangedError, match=r"model-00002-of-00002\.safetensors: changed since it was opened"):
        checkpoint.check_unchanged()


def test_a_hub_id_without_the_hub_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"org/name is no local path; .* pip install 'octavo\[hub\]'"):
        Checkpoint.open("org/name")
