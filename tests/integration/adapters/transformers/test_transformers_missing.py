"""What a checkpoint may lack, and what it may hold beside: as in transformers, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import octavo
from helpers.models import differences
from octavo.errors import CoverageError

LLAMA = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def save(folder: Path, name: str, auto: Any, options: dict[str, Any]) -> Path:
    """Write a random checkpoint of an architecture."""
    torch.manual_seed(0)
    auto.from_config(getattr(transformers, f"{name}Config")(**options), dtype=torch.bfloat16).save_pretrained(folder)
    return folder / "model.safetensors"


def edit(file: Path, new: dict[str, torch.Tensor], gone: tuple[str, ...] = ()) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in gone}
    save_file({**tensors, **new}, file, {"format": "pt"})


def test_positions_that_are_computed_need_not_be_saved(tmp_path: Path) -> None:
    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 96))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"vocab_size": 260, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    options = {"d_model": 64, "max_position_embeddings": 32, **sizes, **heads, **tokens}
    file = save(tmp_path / "saved", "Marian", AutoModelForSeq2SeqLM, options)
    assert not any("embed_positions" in name for name in load_file(file))
    stock = AutoModelForSeq2SeqLM.from_pretrained(file.parent)
    state = torch.random.get_rng_state()
    model = octavo.load(file.parent, scheme=None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert differences(model, stock) == []
    assert not model.model.encoder.embed_positions.weight.requires_grad
    quantized = octavo.load(file.parent)
    through = AutoModelForSeq2SeqLM.from_pretrained(file.parent, quantization_config=octavo.OctavoConfig())
    assert differences(quantized, through) == []
    quantized.save_pretrained(tmp_path / "fp8")
    assert differences(quantized, octavo.load(tmp_path / "fp8")) == []


def test_a_new_head_is_initialised_by_transformers_and_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "Llama", AutoModelForCausalLM, LLAMA).parent
    config = octavo.OctavoConfig()
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, num_labels=3)
    assert 0.01 < model.score.weight.float().std() < 0.05
    assert any("score.weight is new: the checkpoint has none" in note for note in model.load_report.notes)
    assert model.score.weight.requires_grad
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)
    with pytest.raises(CoverageError, match=r"missing: no checkpoint tensor makes score\.weight"):
        octavo.load(folder, model_class=AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("auto", "gone"),
    [
        (AutoModelForSequenceClassification, "model.layers.1.mlp.up_proj.weight"),
        (AutoModelForCausalLM, "lm_head.weight"),
    ],
    ids=["a layer", "the head that was saved"],
)
def test_what_was_saved_may_not_be_missing(tmp_path: Path, auto: Any, gone: str) -> None:
    file = save(tmp_path, "Llama", AutoModelForCausalLM, LLAMA)
    edit(file, {}, (gone,))
    with pytest.raises(CoverageError, match=f"missing: no checkpoint tensor makes {gone}"):
        auto.from_pretrained(tmp_path, quantization_config=octavo.OctavoConfig())


@pytest.mark.parametrize("name", ["GPT2", "GPTJ"])
def test_masks_of_older_versions_are_passed_over(tmp_path: Path, name: str) -> None:
    options = {"vocab_size": 260, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "rotary_dim": 8}
    options |= {"bos_token_id": 1, "eos_token_id": 2}
    file = save(tmp_path, name, AutoModelForCausalLM, options)
    masks = {"bias": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril(), "masked_bias": torch.tensor(-1e4)}
    edit(file, {f"transformer.h.0.attn.{leaf}": mask for leaf, mask in masks.items()})
    model = octavo.load(tmp_path, scheme=None)
    assert differences(model, AutoModelForCausalLM.from_pretrained(tmp_path)) == []


@pytest.mark.parametrize(
    ("leaf", "shape"), [("bias", (3, 1, 8, 8)), ("bias", (1, 1, 8, 9)), ("masked_bias", (1,))], ids=str
)
def test_what_has_not_the_form_of_a_mask_is_unexpected(tmp_path: Path, leaf: str, shape: tuple[int, ...]) -> None:
    file = save(tmp_path, "Llama", AutoModelForCausalLM, LLAMA)
    edit(file, {f"model.layers.0.self_attn.{leaf}": torch.ones(shape)})
    with pytest.raises(CoverageError, match=rf"unexpected: .*self_attn\.{leaf}"):
        octavo.load(tmp_path)
