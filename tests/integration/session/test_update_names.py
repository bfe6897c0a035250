"""`octavo.update` of a saved model takes names of checkpoints, as it takes the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from helpers.models import differences
from octavo.errors import UpdateError

pytest.importorskip("transformers")

from _models import make_checkpoint
from transformers import AutoModelForCausalLM

from octavo.adapters.transformers import usual_names

#: with experts as single matrices, as stacks in the model's layout and in the other one, or renamed; and without any
ARCHITECTURES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "phi3"]
CASES = [
    ("qwen3_moe", "fp8_channel"),
    ("qwen3_moe", "fp8_block"),
    ("qwen3_moe", "fp8_tensor"),
    ("qwen3_moe", "nvfp4"),
    ("mixtral", "int8_channel"),
    ("deepseek_v3", "fp8_channel"),
    ("gpt_oss", "fp8_channel"),
    ("granitemoe", "fp8_channel"),
    ("phi3", "fp8_channel"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoints, old and new."""
    found = {}
    for name in ARCHITECTURES:
        old = make_checkpoint(name, tmp_path_factory.mktemp(name) / "old")
        new = {name: (tensor * 1.7).to(tensor.dtype) for name, tensor in tensors_of(old).items()}
        config = octavo.load(old).config.to_dict()
        config.pop("quantization_config", None)
        found[name] = old, write_checkpoint(tmp_path_factory.mktemp(name) / "new", new, config=config)
    return found


def saved(folder: Path, scheme: str, place: Path, *, pretrained: bool = False) -> Any:
    """A model that was saved quantized, and loaded again."""
    octavo.load(folder, scheme).save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place) if pretrained else octavo.load(place)


@pytest.mark.parametrize(("architecture", "scheme"), CASES)
def test_a_saved_model_takes_names_of_its_architectures_checkpoints(
    architecture: str, scheme: str, folders: Any, tmp_path: Path
) -> None:
    old, new = folders[architecture]
    for pretrained in (False, True):
        model = saved(old, scheme, tmp_path / str(pretrained), pretrained=pretrained)
        octavo.update(model, iter(tensors_of(new).items()))
        assert differences(model, octavo.load(new, scheme)) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", ["a checkpoint", "the model's own names", "saved quantized"])
def test_both_kinds_of_names_may_come_in_one_update(
    architecture: str, source: str, folders: Any, tmp_path: Path
) -> None:
    old, new = folders[architecture]
    if source == "the model's own names":
        stock = AutoModelForCausalLM.from_pretrained(old, dtype=torch.bfloat16)
        tensors = {name: tensor.detach().contiguous() for name, tensor in stock.state_dict().items()}
        old = write_checkpoint(tmp_path, tensors, config=stock.config.to_dict())
    model = saved(old, "fp8_channel", tmp_path) if source == "saved quantized" else octavo.load(old, "fp8_channel")
    trainer = AutoModelForCausalLM.from_pretrained(new, dtype=torch.bfloat16)
    own = {name: tensor for name, tensor in trainer.named_parameters() if "layers.0" in name}
    octavo.update(model, {**own, **{n: t for n, t in tensors_of(new).items() if "layers.0" not in n}})
    assert differences(model, octavo.load(new, "fp8_channel")) == []


def test_where_usual_names_go_is_asked_once_for_a_model(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = folders["qwen3_moe"]
    model = saved(old, "fp8_channel", tmp_path)
    octavo.update(model, tensors_of(old))
    monkeypatch.delattr(usual_names, "usual_routes")
    octavo.update(model, tensors_of(new))
    assert differences(model, octavo.load(new, "fp8_channel")) == []


def test_experts_may_come_in_fp8(folders: Any, tmp_path: Path) -> None:
    old, new = folders["qwen3_moe"]
    stored = fine_grained(tensors_of(new))
    config = {**octavo.load(new).config.to_dict(), "quantization_config": FINE_GRAINED}
    write_checkpoint(tmp_path / "coded", stored, config=config)
    model = saved(old, "fp8_channel", tmp_path / "saved")
    octavo.update(model, iter(stored.items()))
    assert differences(model, octavo.load(tmp_path / "coded", "fp8_channel")) == []


def test_one_expert_may_come_and_half_a_scale_group_may_not(folders: Any, tmp_path: Path) -> None:
    old, new = folders["qwen3_moe"]
    model, sent = saved(old, "fp8_tensor", tmp_path), tensors_of(new)
    expert = "model.layers.1.mlp.experts.3"
    octavo.update(model, {name: tensor for name, tensor in sent.items() if name.startswith(f"{expert}.")})
    mixed: dict[str, Tensor] = {n: t for n, t in tensors_of(old).items() if not n.startswith(f"{expert}.")}
    mixed |= {name: tensor for name, tensor in sent.items() if name.startswith(f"{expert}.")}
    expected = octavo.load(old, "fp8_tensor")
    octavo.update(expected, mixed)
    assert differences(model, expected) == []
    with pytest.raises(UpdateError, match=r"experts\.6\.up_proj\.weight: neither .* Near it are .*experts\."):
        octavo.update(model, {"model.layers.1.mlp.experts.6.up_proj.weight": sent[f"{expert}.up_proj.weight"]})
    with pytest.raises(UpdateError, match=rf"{expert}\.up_proj\.weight is \[3, 3\]; it was \[48, 64\]"):
        octavo.update(model, {f"{expert}.up_proj.weight": torch.ones(3, 3)})


@pytest.mark.parametrize("load", [octavo.load, saved])
def test_names_of_checkpoints_may_be_those_within_another_model(
    load: Any, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    old, new = folders["qwen3_moe"]
    more = (tmp_path / "saved",) if load is saved else ()
    model = torch.nn.ModuleDict({"policy": load(old, "fp8_channel", *more)})
    octavo.update(model, {f"policy.{name}": tensor for name, tensor in tensors_of(new).items()})
    assert differences(model["policy"], octavo.load(new, "fp8_channel")) == []
