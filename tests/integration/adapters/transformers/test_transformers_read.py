"""Models whose own code reads weights by their names: stacks of experts, and layers of other modules."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _models import relative_error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import octavo
from helpers.models import differences
from octavo.adapters.transformers.facts import facts_of
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.running.modules import ReadLinear, ReadStacks, quantized_weights, scale_name
from octavo.running.widened import Widened

_SMALL = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FEW = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "Llama4Text": {**_SMALL, "intermediate_size_mlp": 96, "num_local_experts": 4, "head_dim": 16},
    "LongcatFlash": {
        **_SMALL,
        "num_layers": 1,
        "num_key_value_heads": 4,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 48,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "JetMoe": {
        **{k: v for k, v in _SMALL.items() if k != "num_attention_heads"},
        "kv_channels": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "Dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "vocab_size": 260,
        "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "Mamba": {**_FEW, "state_size": 8},
    "Bloom": {"vocab_size": 260, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Rwkv": {**_FEW, "rescale_every": 1},
    "T5": {"vocab_size": 260, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
}
STACKED = ("Llama4Text", "LongcatFlash", "JetMoe", "Dbrx")


def auto_of(name: str) -> Any:
    return AutoModelForSeq2SeqLM if name == "T5" else AutoModelForCausalLM


@pytest.fixture(scope="module", params=CONFIGS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a random checkpoint of it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    model = auto_of(name).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return name, folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model.eval()(ids, **more).logits


def values(model: Any, name: str, scheme: str, parts: tuple[int, ...]) -> Tensor:
    """What a quantized weight stands for, as the model's class has it."""
    path, _, leaf = name.rpartition(".")
    read = getattr(model.get_submodule(path), leaf)
    if isinstance(read, Widened):
        return read.plain()
    state = dict(model.named_parameters())
    return schemes.dequantize(state[name], state[scale_name(name)], scheme, parts)


def test_answers_are_those_of_the_dequantized_model(source: tuple[str, Path]) -> None:
    name, folder = source
    for scheme in ("fp8_channel", "fp8_block") if name in STACKED else ("fp8_channel",):
        model = octavo.load(folder, scheme=scheme, dtype=torch.float32)
        reference = auto_of(name).from_pretrained(folder, dtype=torch.float32)
        parameters = dict(reference.named_parameters())
        with torch.no_grad():
            for weight, found, parts in quantized_weights(model):
                dequantized, target = values(model, weight, found, parts), parameters[weight]
                assert (dequantized - target).abs().max() <= target.abs().max() / 8
                target.copy_(dequantized)
        assert relative_error(logits(model), logits(reference)) < 1e-5
        assert model.dtype == torch.float32
        kinds = {type(module).__mro__[1] for module in model.modules() if isinstance(module, ReadStacks)}
        assert bool(kinds) == (name in STACKED)


def test_all_ways_to_load_give_the_same_model(source: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = source
    model = octavo.load(folder)
    through = auto_of(name).from_pretrained(folder, quantization_config=octavo.OctavoConfig())
    assert differences(model, through) == []
    model.save_pretrained(tmp_path)
    again = octavo.load(tmp_path)
    assert differences(model, again) == []
    assert differences(model, auto_of(name).from_pretrained(tmp_path)) == []
    expected = logits(model)
    assert torch.equal(logits(through), expected)
    assert torch.equal(logits(again), expected)


def test_a_model_that_is_saved_whole_or_copied_is_the_same(source: tuple[str, Path]) -> None:
    model = octavo.load(source[1])
    for again in (saved_whole(model), copy.deepcopy(model)):
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
        assert differences(again, model) == []
        assert torch.equal(logits(again), logits(copy.deepcopy(model)))  # RWKV divides weights when it is first run


def test_a_model_that_says_another_dtype_than_that_of_its_weights_is_saved_whole(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.TimesFmModel(transformers.TimesFmConfig(**sizes, num_key_value_heads=4, head_dim=16))
    model.bfloat16().save_pretrained(tmp_path)
    model = octavo.load(tmp_path, model_class=transformers.TimesFmModel)
    assert next(model.parameters()).dtype == torch.float8_e4m3fn
    for again in (saved_whole(model), copy.deepcopy(model)):
        assert (type(again), again.dtype) == (type(model), torch.bfloat16)
        assert differences(again, model) == []


def saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_updates_by_the_names_of_the_checkpoint_and_of_the_model_give_the_same_bytes(source: tuple[str, Path]) -> None:
    name, folder = source
    model, other = octavo.load(folder), octavo.load(folder)
    unquantized = auto_of(name).from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in unquantized.parameters():
            parameter.mul_(2)
    new = dict(unquantized.named_parameters())
    octavo.update(model, new)
    other.load_routes = None  # so that all names are the model's own
    octavo.update(other, new)
    assert differences(model, other) == []
    assert differences(model, octavo.load(folder)) != []


def quantizable(name: str, **changes: Any) -> set[str]:
    """The last two names of what becomes FP8, without ``weight``."""
    config = getattr(transformers, f"{name}Config")(**{**CONFIGS[name], **changes})
    with torch.device("meta"):
        model = auto_of(name).from_config(config, dtype=torch.bfloat16)
    found = (n for n, fact in facts_of(model).items() if fact.kind in kinds.QUANTIZABLE)
    return {".".join(n.removesuffix(".weight").split(".")[-2:]) for n in found}


def test_what_inference_does_decides() -> None:
    # dt_proj is multiplied by its own code, even in inference
    assert quantizable("Mamba") == {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj", "lm_head"}
    assert {"self_attention.dense", "mlp.dense_4h_to_h"} <= quantizable("Bloom")
    sliced = quantizable("Bloom", pretraining_tp=2, slow_but_exact=True)
    assert not {"self_attention.dense", "mlp.dense_4h_to_h"} & sliced
    assert "DenseReluDense.wo" in quantizable("T5")
    rescaled = {"attention.output", "feed_forward.value"}  # divided in place, by the model around them
    assert {"attention.value", "feed_forward.key"} <= quantizable("Rwkv")
    assert not rescaled & quantizable("Rwkv")


def test_the_report_names_what_is_kept_with_most_bytes_first(source: tuple[str, Path]) -> None:
    sizes = [size for _, size in octavo.load(source[1]).load_report.kept.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_a_layer_whose_dtype_is_asked_answers_with_that_of_activations(tmp_path: Path) -> None:
    config = transformers.T5Config(**CONFIGS["T5"])
    AutoModelForSeq2SeqLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = octavo.load(tmp_path)
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(layer, ReadLinear)
    assert layer.weight.dtype == torch.bfloat16
    assert dict(layer.named_parameters())["weight"].dtype == torch.float8_e4m3fn
