"""From SGLang's arguments to the config that it reads for a checkpoint; needs no SGLang."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from octavo.adapters.sglang import asking
from octavo.errors import CheckpointError, RecipeError


@dataclass
class Arguments:
    """Of SGLang's ``ServerArgs``, those that matter here."""

    model_path: str = "target"
    quantization: str | None = None
    load_format: str = "auto"
    model_loader_extra_config: Any = "{}"
    speculative_draft_model_quantization: str | None = None
    speculative_draft_load_format: str | None = None
    speculative_draft_model_path: str | None = None


@dataclass
class Config:
    """What config.json holds."""

    text_config: Any = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.__dict__.update(self.extra)

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


@dataclass
class ModelConfig:
    hf_config: Any


def asked(config: Any, model: str = "target", draft: bool = False, **arguments: Any) -> Any:
    server_args = Arguments(**arguments)
    assert asking.is_asked_for(server_args)
    asking.settle(server_args)
    with asking.about(server_args, model, is_draft_model=draft):
        return asking.with_quantization(config, model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(
        {"model.layers.0.mlp.down_proj.weight": torch.ones(128, 128, dtype=torch.bfloat16)}, tmp_path / "a.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "scheme"),
    [
        ({"load_format": "octavo"}, "auto"),
        ({"quantization": "octavo_fp8_block"}, "fp8_block"),
        ({"quantization": "octavo_fp8_block", "load_format": "safetensors"}, "fp8_block"),
        ({"quantization": "octavo_fp8_block", "load_format": "octavo"}, "fp8_block"),
        ({"load_format": "octavo", "model_loader_extra_config": '{"scheme": "fp8_block"}'}, "fp8_block"),
    ],
)
def test_both_ways_of_asking_become_one(arguments, scheme):
    server_args = Arguments(**arguments)
    assert asking.is_asked_for(server_args)
    asking.settle(server_args)
    assert (server_args.quantization, server_args.load_format) == (None, "octavo")
    assert json.loads(server_args.model_loader_extra_config)["scheme"] == scheme
    before = copy.deepcopy(server_args)
    asking.settle(server_args)
    assert server_args == before


@pytest.mark.parametrize("quantization", [None, "fp8", "compressed-tensors"])
def test_others_are_not_asking_for_octavo(quantization):
    assert not asking.is_asked_for(Arguments(quantization=quantization))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"load_format": "octavo", "quantization": "fp8"}, "leave --quantization fp8 out"),
        ({"load_format": "gguf", "quantization": "octavo_fp8_block"}, "--load-format gguf reads weights itself"),
        ({"speculative_draft_load_format": "octavo"}, "a draft only beside a target"),
        ({"quantization": "octavo_mxfp8"}, "mxfp8 is not offered in SGLang"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, problem):
    server_args = Arguments(**arguments)
    assert asking.is_asked_for(server_args)
    with pytest.raises(RecipeError, match=problem):
        asking.settle(server_args)


def test_the_config_is_that_of_an_fp8_checkpoint_and_says_whose_it_is():
    given = Config()
    found = asked(given, quantization="octavo_fp8_block")
    assert not hasattr(given, "quantization_config")
    assert found.quantization_config["quant_method"] == "compressed-tensors"
    assert asking.scheme_of(ModelConfig(found)) == "fp8_block"
    extra = '{"scheme": "fp8_block", "format": "fp8"}'
    found = asked(given, load_format="octavo", model_loader_extra_config=extra)
    assert found.quantization_config["quant_method"] == "fp8"
    assert found.quantization_config["weight_block_size"] == [128, 128]
    assert asking.scheme_of(ModelConfig(given)) is None
    assert asking.with_quantization(given, "target") is given  # nobody has asked


def test_a_draft_is_of_the_target_or_has_a_scheme_or_stays():
    assert asking.scheme_of(ModelConfig(asked(Config(), draft=True, load_format="octavo"))) == "fp8_channel"
    own: dict[str, Any] = {"model": "other", "draft": True, "load_format": "octavo"}
    assert asking.scheme_of(ModelConfig(asked(Config(), **own))) is None
    own["speculative_draft_model_quantization"] = "octavo_fp8_block"
    assert asking.scheme_of(ModelConfig(asked(Config(), **own))) == "fp8_block"


def declaring(method: str) -> list[Config]:
    """In the places where configs declare how weights are quantized."""
    declared = {"quant_method": method}
    return [
        Config(extra={"quantization_config": declared}),
        Config(extra={"compression_config": Config(extra=declared)}),
        Config(text_config=Config(extra={"quantization_config": declared})),
    ]


@pytest.mark.parametrize("config", declaring("gptq"))
def test_what_cant_be_decoded_is_refused_by_its_config(config):
    with pytest.raises(RecipeError, match=r"can't decode target, which is quantized already \(gptq\): leave it and"):
        asked(config, load_format="octavo")


@pytest.mark.parametrize("config", declaring("fp8"))
def test_of_what_can_be_decoded_no_config_says_so_any_more(config):
    before = copy.deepcopy(config)
    found = asked(config, load_format="octavo")
    assert config == before
    assert asking.scheme_of(ModelConfig(found)) == "fp8_channel"
    assert not hasattr(found, "compression_config")
    assert not hasattr(found.text_config, "quantization_config")


@pytest.mark.parametrize("role", ["target", "draft"])
def test_what_is_here_is_opened_and_planned_before_sglang_starts_anything(folder, role):
    arguments = Arguments(load_format="octavo", model_loader_extra_config='{"ignore": ["*.qkv_proj"]}')  # a layer's
    if role == "target":
        arguments.model_path = str(folder)
    else:
        arguments.speculative_draft_model_path = str(folder)
        arguments.speculative_draft_model_quantization = "octavo_fp8_block"
    asking.settle(copy.copy(arguments))
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(RecipeError, match=rf"can't decode {folder}, which is quantized already \(gptq"):
        asking.settle(copy.copy(arguments))
    (folder / "a.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        asking.settle(copy.copy(arguments))


def in_blocks(folder: Path) -> Path:
    stored = fine_grained({"model.layers.0.mlp.down_proj.weight": torch.randn(128, 128).bfloat16()})
    return write_checkpoint(folder, stored, config={"quantization_config": FINE_GRAINED})


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("extra", [{}, {"scheme": "auto"}, {"format": "fp8"}])
def test_a_source_in_blocks_stays_so_where_no_scheme_is_named(tmp_path: Path, extra: Any, here: bool) -> None:
    config = Config(extra={"quantization_config": FINE_GRAINED})
    folder = str(in_blocks(tmp_path)) if here else "target"
    found = asked(config, folder, model_path=folder, load_format="octavo", model_loader_extra_config=extra)
    assert asking.scheme_of(ModelConfig(found)) == "fp8_block"


def test_the_format_of_blocks_alone_needs_a_source_in_blocks_or_a_scheme(folder: Path) -> None:
    for path in (str(folder), "target"):
        with pytest.raises(RecipeError, match="the format 'fp8' has no fp8_channel, only fp8_block"):
            asked(Config(), path, model_path=path, load_format="octavo", model_loader_extra_config={"format": "fp8"})


@pytest.mark.parametrize("extra", [{"scheme": "fp8_block"}, '{"scheme": "fp8_block"}'])
def test_the_extra_config_is_taken_as_what_it_means_too(extra: Any) -> None:
    server_args = Arguments(load_format="octavo", model_loader_extra_config=extra)
    asking.settle(server_args)
    assert json.loads(server_args.model_loader_extra_config) == {"scheme": "fp8_block"}


@pytest.mark.parametrize("extra", ["null", None, "", {}])
def test_an_extra_config_that_says_nothing_is_the_default(extra: Any) -> None:
    server_args = Arguments(load_format="octavo", model_loader_extra_config=extra)
    asking.settle(server_args)
    assert json.loads(server_args.model_loader_extra_config) == {"scheme": "auto"}
