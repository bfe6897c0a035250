"""Tiny random checkpoints of architectures that vLLM serves, with sides that block kernels take (multiples of 128)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import octavo

from .folders import edit_tensors
from .models import random_model

SMALL = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_DEEPSEEK = {
    **SMALL,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # SmolLM2's sides and tied embeddings; block scales don't fit 576 rows
    "smollm2": (
        "LlamaConfig",
        {
            **SMALL,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 260,
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 128,
        },
    ),
    "llama": ("LlamaConfig", SMALL),
    # for two ranks: each has 128 rows and columns of every matrix
    "llama wide": (
        "LlamaConfig",
        {**SMALL, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "qwen2_moe": ("Qwen2MoeConfig", {**SMALL, **_EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen2_moe wide": (
        "Qwen2MoeConfig",
        {
            **SMALL,
            **_EXPERTS,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL, **_EXPERTS, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_DEEPSEEK,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_DEEPSEEK,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
    ),
    "gemma3": ("Gemma3TextConfig", {**SMALL, "head_dim": 32}),
    "phi3": ("Phi3Config", {**SMALL, "pad_token_id": 0}),
    "granitemoe": ("GraniteMoeConfig", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe wide": (
        "GraniteMoeConfig",
        {
            **SMALL,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **SMALL,
            "shared_intermediate_size": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["attention", "attention"],
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **SMALL,
            "head_dim": 32,
            "global_head_dim": 32,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 128,
            "vocab_size_per_layer_input": 260,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **SMALL,
            "head_dim": 32,
            "intermediate_size_mlp": 256,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **SMALL,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "first_k_dense_replace": 1,
            "head_dim": 32,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 64,
            "state_size": 16,
            "n_groups": 2,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **SMALL,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """A random bf16 checkpoint of one of `CONFIGS`."""
    random_model(*CONFIGS[name], seed=seed).save_pretrained(folder)
    return folder


def with_mtp(source: Path, *, copies: bool = True) -> Path:
    """Add a layer that predicts the token after the next to a mixture of experts, like the last one of the model.

    Published ones bring ``copies`` of the model's embedding and head.
    """
    config = json.loads((source / "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    (source / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    torch.manual_seed(1)

    def add(tensors: dict[str, Tensor]) -> None:
        last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
        tensors.update({n.replace(last, new): t.clone() for n, t in tensors.items() if n.startswith(last)})
        tensors[f"{new}eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{new}{norm}.weight"] = torch.randn(hidden).bfloat16()
        if copies:
            tensors[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()

    return edit_tensors(source, add)


def convert(source: Path, scheme: str) -> Path:
    """The checkpoint that octavo writes, beside its source. vLLM is not asked, which takes longer than all else."""
    target = source.with_name(f"{source.name}-{scheme}")
    octavo.convert(source, target, scheme, prove=False)
    return target
