"""`octavo.update`: new weights in place have the bytes of a load; addresses stay, and memory does not grow."""

from __future__ import annotations

import gc
import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.models import differences, state_of
from octavo.errors import LoaderError, UpdateError
from octavo.machine import rss_bytes

pytest.importorskip("transformers")

from _models import QUANTIZED, SCHEMES, make_checkpoint, prompt
from transformers import AutoModelForCausalLM, LlamaConfig

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, made = tmp_path_factory.mktemp("updates"), {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(architecture, root / architecture)
        return made[architecture]

    return folder


def changed(tensors: dict[str, Tensor], factor: float = 1.7) -> dict[str, Tensor]:
    return {name: (tensor * factor).to(tensor.dtype) for name, tensor in tensors.items()}


def loaded_from(folder: Path, tensors: dict[str, Tensor], target: Path, scheme: str) -> Any:
    """What a load of the new weights gives."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return octavo.load(target, scheme)


def addresses(model: Any) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor.data_ptr()) for name, tensor in state_of(model).items()}


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "with holes"])
def test_an_update_in_batches_is_the_same(
    dense: bool, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator; tensors that don't lie in one run are copied first, and the copies are not kept."""
    folder = checkpoints("qwen2_moe")
    new = changed(tensors_of(folder))
    given = new if dense else {name: torch.stack([tensor] * 2, -1)[..., 0] for name, tensor in new.items()}
    monkeypatch.setattr(
        importlib.import_module("octavo.session.quantize.quantizer"), "has_batches", lambda device: True
    )
    for scheme in SCHEMES:
        model = octavo.load(folder, scheme)
        octavo.update(model, given)
        assert differences(model, loaded_from(folder, new, tmp_path / scheme, scheme)) == []


@pytest.mark.parametrize("architecture", [name for name in QUANTIZED if name != "phi3"])
def test_an_update_is_what_loading_it_would_be(architecture: str, checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints(architecture)
    new = changed(tensors_of(folder))
    for scheme in SCHEMES if architecture in ("llama", "qwen2_moe", "gpt_oss") else ("fp8_block",):
        model = octavo.load(folder, scheme)
        before = addresses(model)
        report = octavo.update(model, random.Random(3).sample(list(new.items()), len(new)))
        assert differences(model, loaded_from(folder, new, tmp_path / scheme, scheme)) == []
        assert addresses(model) == before
        assert report.taken_bytes == sum(tensor.nbytes for tensor in new.values())
        assert report.updated


def test_an_update_by_the_models_own_names_is_the_same(checkpoints: Any, tmp_path: Path) -> None:
    """As a trainer has them: stacks of experts, in the class's own layout."""
    for architecture in ("qwen2_moe", "gpt_oss"):
        folder = checkpoints(architecture)
        new = changed(tensors_of(folder))
        expected = loaded_from(folder, new, tmp_path / architecture, "fp8_channel")
        trainer = AutoModelForCausalLM.from_pretrained(tmp_path / architecture, dtype=torch.bfloat16)
        model = octavo.load(folder, "fp8_channel")
        del model.load_routes  # names of checkpoints mean nothing now
        model.load_routes = None
        octavo.update(model, trainer.named_parameters())
        assert differences(model, expected) == []


def test_a_model_from_pretrained_updates_too(checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints("qwen2_moe")
    new = changed(tensors_of(folder))
    config = octavo.OctavoConfig("fp8_block")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    octavo.update(model, new.items())
    expected = loaded_from(folder, new, tmp_path / "new", "fp8_block")
    with torch.no_grad():
        assert same_bytes(model(prompt()).logits, expected(prompt()).logits)


def test_a_trainer_in_fp32_gives_the_bytes_of_its_fp32_weights(checkpoints: Any) -> None:
    folder = checkpoints("llama")
    model = octavo.load(folder)
    new = tensors_of(folder)[Q].float() * 1.0001
    octavo.update(model, [(Q, new)])
    assert same_bytes(model.get_parameter(Q), octavo.schemes.quantize(new, "fp8_channel")[0])


def test_a_partial_update_leaves_the_rest(checkpoints: Any) -> None:
    folder = checkpoints("qwen2_moe")
    model, before = octavo.load(folder), octavo.load(folder)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    report = octavo.update(model, [(name, tensors_of(folder)[name] * 3)])
    assert report.updated == ["model.layers.1.mlp.experts"]
    stack = "model.layers.1.mlp.experts.gate_up_proj"
    assert differences(model, before) in ([stack, f"{stack}_scale"], [f"{stack}_scale"])
    old, new = before.get_parameter(f"{stack}_scale"), model.get_parameter(f"{stack}_scale")
    rows = old.shape[1] // 2
    assert torch.equal(old[2, :rows], new[2, :rows])
    assert not torch.equal(old[2, rows:], new[2, rows:])
    assert torch.equal(old[[0, 1, 3, 4, 5]], new[[0, 1, 3, 4, 5]])


def test_an_update_that_fails_tells_what_is_new_and_heals(checkpoints: Any, tmp_path: Path) -> None:
    folder = checkpoints("llama")
    model = octavo.load(folder)
    new = changed(tensors_of(folder))

    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield Q, new[Q]
        raise TimeoutError("no answer from the trainer")

    with pytest.raises(UpdateError, match="no answer from the trainer") as caught:
        octavo.update(model, breaking())
    assert caught.value.new == ("model.layers.0.self_attn.q_proj",)
    assert caught.value.torn == ()
    with pytest.raises(UpdateError, match="neither the checkpoint nor the model has such a tensor"):
        octavo.update(model, [("nowhere.weight", new[Q])])
    with pytest.raises(UpdateError, match=r"is \[3\]; it was \[136, 136\] in the checkpoint"):
        octavo.update(model, [(Q, torch.ones(3))])
    octavo.update(model, new.items())
    assert differences(model, loaded_from(folder, new, tmp_path / "new", "fp8_channel")) == []


def test_a_state_dict_brings_tied_parameters_under_each_name(tmp_path: Path) -> None:
    trainer = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=32,
            tie_word_embeddings=True,
        ),
        dtype=torch.bfloat16,
    )
    trainer.save_pretrained(tmp_path / "old")
    model = octavo.load(tmp_path / "old")
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.5)
    trainer.save_pretrained(tmp_path / "new")
    state = trainer.state_dict()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= state.keys()
    octavo.update(model, state)  # a mapping, too
    assert differences(model, octavo.load(tmp_path / "new")) == []
    octavo.update(model, reversed(state.items()))
    assert differences(model, octavo.load(tmp_path / "new")) == []
    other = {"lm_head.weight": state["lm_head.weight"] + 1}
    with pytest.raises(UpdateError, match=r"lm_head.weight differs from what came as model.embed_tokens.weight"):
        octavo.update(model, {**state, **other})
    octavo.update(model, other, more=True)
    with pytest.raises(UpdateError, match=r"model.embed_tokens.weight differs from what came as lm_head.weight"):
        octavo.update(model, state)


@pytest.mark.parametrize("dtype", [torch.int8, octavo.schemes.FP8])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_numbers_without_their_scales_are_refused(name: str, dtype: torch.dtype, checkpoints: Any) -> None:
    folder = checkpoints("llama")
    model = octavo.load(folder)
    with pytest.raises(UpdateError, match=f"{name} is .*; an update takes bf16, fp16 or fp32") as caught:
        octavo.update(model, [(name, tensors_of(folder)[name].to(dtype))])
    assert not caught.value.new
    assert not caught.value.torn
    assert differences(model, octavo.load(folder)) == []


@pytest.mark.parametrize("lost", ["meta", "freed"])
@pytest.mark.parametrize("name", [Q, "model.norm.weight"])
def test_tensors_without_memory_are_refused(name: str, lost: str, checkpoints: Any) -> None:
    folder = checkpoints("llama")
    model = octavo.load(folder)
    tensor = tensors_of(folder)[name].to("meta" if lost == "meta" else "cpu", copy=True)
    if lost == "freed":
        tensor.untyped_storage().resize_(0)  # type: ignore[no-untyped-call]
    with pytest.raises(UpdateError, match=f"{name} .* has no values; gather it before the update") as caught:
        octavo.update(model, [(name, tensor)])
    assert not caught.value.new
    assert not caught.value.torn
    assert differences(model, octavo.load(folder)) == []


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of one rank: this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_refused_and_may_be_gathered_on_the_way(
    mesh: Any, checkpoints: Any, tmp_path: Path
) -> None:
    folder = checkpoints("llama")
    model, new = octavo.load(folder), changed(tensors_of(folder))
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in new.items()}
    with pytest.raises(UpdateError, match=r"is a DTensor, .* tensor\.full_tensor\(\)\) gathers each") as caught:
        octavo.update(model, sharded)
    assert not caught.value.new
    assert not caught.value.torn
    octavo.update(model, sharded, transform=lambda name, tensor: (name, tensor.full_tensor()))
    assert differences(model, loaded_from(folder, new, tmp_path / "new", "fp8_channel")) == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
def test_bf16_weights_are_not_cast_into_fp8_by_load_state_dict(architecture: str, checkpoints: Any) -> None:
    folder = checkpoints(architecture)
    model = octavo.load(folder)
    model.load_state_dict(model.state_dict())
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"torch.bfloat16 into FP8 weights; octavo.update\(model, state_dict\)"):
            model.load_state_dict(wide, strict=strict)
    assert differences(model, octavo.load(folder)) == []


def test_a_model_without_fp8_weights_is_refused(checkpoints: Any) -> None:
    with pytest.raises(LoaderError, match=r"load it with octavo\.load"):
        octavo.update(octavo.load(checkpoints("llama"), None), [])


@pytest.mark.peers
@pytest.mark.timeout(900)
def test_a_thousand_updates_keep_addresses_and_memory_and_are_right_each(checkpoints: Any) -> None:
    folder = checkpoints("qwen2_moe")
    tensors = tensors_of(folder)
    model = octavo.load(folder, "fp8_block")
    before = addresses(model)
    held: list[tuple[int, int]] = []
    stack, scale = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj_scale"
    for step in range(1000):
        factor = 0.5 + (step % 97) / 50
        octavo.update(model, ((name, (tensor * factor).to(tensor.dtype)) for name, tensor in tensors.items()))
        weight = torch.stack(
            [
                torch.cat([tensors[f"model.layers.0.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")])
                for e in range(6)
            ]
        )
        q, s = octavo.schemes.quantize((weight * factor).to(weight.dtype), "fp8_block", (136, 136))
        assert same_bytes(model.get_parameter(stack), q)
        assert same_bytes(model.get_parameter(scale), s)
        if step % 100 == 99:
            gc.collect()
            tensors_alive = sum(issubclass(type(found), Tensor) for found in gc.get_objects())
            held.append((tensors_alive, rss_bytes()))
    assert addresses(model) == before
    assert held[-1][0] <= held[0][0]
    # malloc needs some hundred updates to have all that it will ever need
    assert held[-1][1] - held[4][1] < 4 << 20
