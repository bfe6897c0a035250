"""peft on models that octavo loaded: adapters of linear layers whose weights are FP8."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

import octavo
from helpers.models import differences, random_model
from octavo.errors import LoaderError
from octavo.numerics import schemes
from octavo.running.modules import quantized_weights, scale_name

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CONFIG = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    random_model("LlamaConfig", CONFIG).save_pretrained(made)
    return made


def dequantized(model: Any, folder: Path) -> Any:
    """The stock model, its weights those that the FP8 numbers stand for."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, scheme, parts in quantized_weights(model):
            values = schemes.dequantize(state[name], state[scale_name(name)], scheme, parts)
            reference.get_parameter(name).copy_(values)
    return reference


def with_adapters(model: Any, **options: Any) -> Any:
    """LoRA of two kinds of layers, which do something."""
    config = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options)
    made = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora" in name}


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).float().norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_train_and_answer_as_on_the_dequantized_model(folder: Path, options: dict[str, Any]) -> None:
    model = octavo.load(folder)
    reference = with_adapters(dequantized(model, folder), **options)
    adapted = with_adapters(model, **options)
    assert {parameter.dtype for parameter in adapters(adapted).values()} == {torch.bfloat16}
    with torch.no_grad():
        assert error(adapted(TOKENS).logits, reference(TOKENS).logits) < 0.03  # of bf16 activations
    for trained in (adapted, reference):
        trained(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in adapters(reference).items():
        assert error(adapters(adapted)[name].grad, parameter.grad) < 0.1, name
    assert all(p.grad is None for n, p in adapted.named_parameters() if "lora" not in n)


def test_adapters_are_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    adapted = with_adapters(octavo.load(folder)).eval()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(octavo.load(folder), tmp_path, autocast_adapter_dtype=False)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, adapted(TOKENS).logits)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_fp8_is_refused_and_changes_nothing(folder: Path, safe: bool) -> None:
    adapted = with_adapters(octavo.load(folder))
    with pytest.raises(LoaderError, match="nor an adapter be merged into it"):
        adapted.merge_and_unload(safe_merge=safe)
    with pytest.raises(LoaderError, match="merge an adapter into the bf16 checkpoint"):
        adapted.merge_adapter(safe_merge=safe)
    assert differences(adapted.unload(), octavo.load(folder)) == []
