"""`verify(..., reader="transformers")`: what transformers would make of an FP8 checkpoint, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.errors import CheckpointError, RecipeError

compressed_tensors: Any = pytest.importorskip("compressed_tensors")
transformers: Any = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "dtype": "bfloat16",
}
PROJECTION, HEAD = "model.layers.1.mlp.up_proj", "lm_head.weight"


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "source")
    octavo.convert(tmp_path / "source", tmp_path / "out", progress=False)
    return tmp_path / "out"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A checkpoint that compressed-tensors made, with static scales of activations."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    group = {"targets": ["Linear"], "weights": fp8, "input_activations": {**fp8, "dynamic": False}}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], quant_method="compressed-tensors")
    model = llama()
    apply_quantization_config(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("_scale"):
            parameter.data.fill_(0.01)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "others")
    compressor.update_config(str(tmp_path / "others"))
    return tmp_path / "others"


def test_all_is_read_right(converted: Path) -> None:
    report = octavo.verify(converted, reader="transformers")
    assert report.ok
    assert list(report.lines()) == [f"transformers {transformers.__version__} reads all as it is meant"]
    assert report.to_dict()["by"] == "reader"


def test_bytes_and_reader_can_be_asked_for_together(converted: Path) -> None:
    report = octavo.verify(converted, converted.with_name("source"), reader="transformers")
    assert report.ok
    assert report.tensors
    assert report.judgement is not None


def test_anothers_checkpoint_is_read_right(others: Path) -> None:
    assert any(name.endswith("input_scale") for name in load_file(others / "model.safetensors"))
    assert list(octavo.verify(others, reader="transformers").lines())[:-1] == []


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "change", "said"),
    [
        pytest.param(
            edit_config,
            lambda config: config.pop("quantization_config"),
            f"misread: {PROJECTION}.weight: it takes the codes for weights: its Linear holds bf16",
            id="no declaration",
        ),
        pytest.param(
            edit_config,
            lambda config: config["quantization_config"].update(ignore=[PROJECTION, "lm_head"]),
            f"misread: {PROJECTION}.weight: it takes the codes for weights: its Linear holds bf16",
            id="declared unquantized",
        ),
        pytest.param(
            edit_config,
            lambda config: config["quantization_config"].update(ignore=[]),
            "waiting: lm_head: it wants a scale there, and the checkpoint has none",
            id="declared quantized",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.pop(f"{PROJECTION}.weight_scale"),
            f"misread: {PROJECTION}.weight: it has no scale beside it",
            id="a scale is gone",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.update({f"{PROJECTION}.weight": tensors[f"{PROJECTION}.weight"].view(torch.uint8)}),
            f"misread: {PROJECTION}.weight: it is uint8, and read as FP8 with a scale",
            id="bits for numbers",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.update({f"{PROJECTION}.weight": tensors[f"{PROJECTION}.weight"].bfloat16()}),
            f"misread: {PROJECTION}.weight: it is bf16, and read as FP8 with a scale",
            id="a scale that was left",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.update({f"{PROJECTION}.weight_scale": tensors[f"{PROJECTION}.weight_scale"].int()}),
            f"misread: {PROJECTION}.weight: its scale is int32, and read as bf16",
            id="a scale of another kind",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.update(strange=torch.ones(3)),
            "unexpected: it has no place for strange",
            id="a tensor too many",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.pop("model.norm.weight"),
            "missing: nothing in the checkpoint makes model.norm.weight",
            id="a tensor is gone",
        ),
        pytest.param(
            edit_tensors,
            lambda tensors: tensors.update({f"{PROJECTION}.weight_scale": torch.ones(64, 1)}),
            f"refused: {PROJECTION}.weight",
            id="a scale of another shape",
        ),
    ],
)
def test_what_is_misread_is_named(
    edit: Callable[..., None], change: Callable[..., object], said: str, converted: Path
) -> None:
    edit(converted, change)
    report = octavo.verify(converted, reader="transformers")
    assert not report.ok
    assert any(line.startswith(said) for line in report.lines()), list(report.lines())


PACKED = "model.layers.0.mlp.up_proj.weight"


def in_int4(weight: torch.Tensor, groups: int) -> dict[str, torch.Tensor]:
    """Any numbers, as compressed-tensors packs them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    numbers = torch.randint(-8, 8, weight.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.full((len(weight), groups), 0.01, dtype=torch.bfloat16)
    return {"_packed": pack_to_int32(numbers, 4), "_scale": scale, "_shape": torch.tensor(weight.shape)}


def write_packed(folder: Path, stored_bits: int, declared_bits: int, group: int | None) -> None:
    """All linear layers packed, and what is declared of them."""
    llama().save_pretrained(folder.with_name("source"))
    octavo.convert(folder.with_name("source"), folder, "int8_channel", progress=False)
    arguments = {"num_bits": declared_bits, "type": "int", "strategy": "channel", "symmetric": True}
    arguments |= {"strategy": "group", "group_size": group} if group else {}

    def change(tensors: dict[str, torch.Tensor]) -> None:
        plain = load_file(folder.with_name("source") / "model.safetensors")
        for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
            groups = plain[name].shape[1] // group if group else 1
            if stored_bits == 4:
                tensors.update({name + end: part for end, part in in_int4(plain[name], groups).items()})
            tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:, :1].repeat(1, groups)

    edit_tensors(folder, change)
    edit_config(
        folder,
        lambda config: config["quantization_config"].update(
            config_groups={"group_0": {"targets": ["Linear"], "weights": arguments}}
        ),
    )


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("stored_bits", [4, 8])
@pytest.mark.parametrize("declared_bits", [4, 8])
def test_bits_that_the_config_contradicts_are_named(
    stored_bits: int, declared_bits: int, group: int | None, tmp_path: Path
) -> None:
    write_packed(tmp_path / "out", stored_bits, declared_bits, group)
    report = octavo.verify(tmp_path / "out", reader="transformers")
    assert report.ok == (stored_bits == declared_bits)
    said = f"contradiction: {PACKED}_shape says [128, 64], and {PACKED}_packed holds "
    if group:
        kind = "int4" if declared_bits == 4 else "packed int8"
        words = 64 * stored_bits // 32
        said = f"contradiction: {PACKED}_scale is [128, 2] beside {PACKED}_packed, I32 [128, {words}], and its "
        said += f"config.json says {kind} in groups of 32"
    assert any(line.startswith(said) for line in report.lines()) == (not report.ok)


def test_bits_that_the_config_contradicts_are_named_beside_the_source(tmp_path: Path) -> None:
    """All whose bytes are right."""
    write_packed(tmp_path / "out", 8, 8, None)
    assert octavo.verify(tmp_path / "out", against=tmp_path / "source").ok
    write_packed(tmp_path / "other", 8, 4, None)
    with pytest.raises(CheckpointError, match=rf"{PACKED}_shape says \[128, 64\], and {PACKED}_packed holds "):
        octavo.verify(tmp_path / "other", against=tmp_path / "source")


@pytest.mark.parametrize("format", ["compressed-tensors", "fp8"])
def test_fp8_that_a_config_excludes_needs_no_scale(format: str, tmp_path: Path) -> None:
    """A conversion keeps what the source has so."""
    llama().save_pretrained(tmp_path / "source")
    edit_tensors(tmp_path / "source", lambda ts: ts.update({HEAD: ts[HEAD].to(torch.float8_e4m3fn)}))
    octavo.convert(tmp_path / "source", tmp_path / "out", "fp8_block", format=format, progress=False)
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    config = json.loads((tmp_path / "out/config.json").read_text())
    declared, key = config["quantization_config"], "ignore" if format != "fp8" else "modules_to_not_convert"
    declared[key] = [name for name in declared[key] if "lm_head" not in name]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert HEAD in octavo.verify(tmp_path / "out", reader="transformers").judgement.misread


def test_a_config_that_can_not_be_understood_is_named_beside_the_source(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "eight"
    (converted / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        octavo.verify(converted, against=converted.with_name("source"))
    assert "its config.json says of its quantization: num_bits is 'eight', and type 'float'" in str(error.value)
    assert "and its config.json says of none how it is quantized" in str(error.value)


def test_who_can_not_be_asked_is_named(converted: Path) -> None:
    with pytest.raises(RecipeError, match="unknown reader 'nobody'; known: transformers"):
        octavo.verify(converted, reader="nobody")
    with pytest.raises(CheckpointError, match="holds no tensors in float8_e4m3fn"):
        octavo.verify(converted.with_name("source"), reader="transformers")
