"""Tiny random checkpoints of architectures that SGLang serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .folders import edit_tensors
from .models import random_model
from .vllm_checkpoints import CONFIGS as OF_VLLM
from .vllm_checkpoints import SMALL
from .vllm_checkpoints import convert as converted

_YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 40.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}


def _deepseek(name: str, **sizes: Any) -> tuple[str, dict[str, Any]]:
    """As published: positions by YaRN, an intermediate size for the dense layer that experts don't have."""
    kind, config = OF_VLLM[name]
    return kind, {**config, "max_position_embeddings": 4096, "rope_scaling": _YARN, "moe_layer_freq": 1, **sizes}


def _wide(name: str, **sizes: Any) -> tuple[str, dict[str, Any]]:
    """For two ranks: each has 128 rows and columns, or a multiple, of every matrix."""
    kind, config = {**OF_VLLM, **CONFIGS}[name]
    return kind, {**config, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, **sizes}


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: OF_VLLM[name] for name in ("llama", "mixtral", "qwen2_moe", "qwen3_moe", "phi3", "opt", "granitemoe")},
    **{name: OF_VLLM[name] for name in ("llama wide", "qwen2_moe wide", "granitemoe wide")},
    # sides of 192 and 320, which blocks of 128 don't divide
    "llama odd": (
        "LlamaConfig",
        {
            **SMALL,
            "hidden_size": 192,
            "intermediate_size": 320,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    # heads, columns and a vocabulary that two ranks don't divide
    "llama ragged": (
        "LlamaConfig",
        {
            **SMALL,
            "vocab_size": 261,
            "hidden_size": 384,
            "intermediate_size": 321,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
    ),
    # a head of keys that both of two ranks have, and a head that is the embedding
    "qwen2 shared": (
        "Qwen2Config",
        {
            **SMALL,
            "vocab_size": 261,
            "hidden_size": 512,
            "intermediate_size": 512,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("Qwen2Config", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 32}),
    "olmoe": ("OlmoeConfig", {**SMALL, "intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}),
    "gpt_oss": ("GptOssConfig", {**OF_VLLM["gpt_oss"][1], "swiglu_limit": 7.0}),
    "deepseek_v2": _deepseek("deepseek_v2", q_lora_rank=None, topk_method="greedy", scoring_func="softmax"),
    "deepseek_v3": _deepseek("deepseek_v3"),
    "deepseek_v3 wide": _deepseek("deepseek_v3", moe_intermediate_size=256),
}
CONFIGS |= {
    "deepseek_v2 wide": ("DeepseekV2Config", {**CONFIGS["deepseek_v2"][1], "moe_intermediate_size": 256}),
    "opt wide": ("OPTConfig", {**OF_VLLM["opt"][1], "hidden_size": 256, "word_embed_proj_dim": 256}),
    "olmoe wide": _wide("olmoe", intermediate_size=256),
    "qwen3_moe wide": _wide("qwen3_moe", moe_intermediate_size=256),
    **{f"{name} wide": _wide(name) for name in ("mixtral", "qwen2", "qwen3", "gemma2", "phi3")},
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """A random bf16 checkpoint of one of `CONFIGS`."""
    random_model(*CONFIGS[name], seed=seed).save_pretrained(folder)
    return folder


def convert(source: Path, scheme: str) -> Path:
    """The checkpoint that octavo writes, with experts by the names by which SGLang knows them.

    Granite's it takes by Mixtral's names alone, and passes over others without an error.
    """
    target = converted(source, scheme)
    if "GraniteMoe" in (source / "config.json").read_text():
        edit_tensors(target, _as_in_mixtral)
    return target


def _as_in_mixtral(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        head, dot, tail = name.partition(".experts.")
        for part, other in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            tail = tail.replace(part, other)
        tensors[head + dot + tail] = tensors.pop(name)
