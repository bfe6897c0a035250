"""Tiny random checkpoints of the architectures that the integration tests cover, and models loaded from them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers.models import random_model
from octavo.choices import DEFAULT_SCHEME
from octavo.numerics import schemes
from octavo.running.modules import quantized_weights

pytest.importorskip("transformers")

_SMALL = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# sides above 128 that neither 128 nor 32 divides (but 8 does: torch.grouped_mm, which transformers uses, asks for it)
_UNEVEN = {**_SMALL, "hidden_size": 136, "intermediate_size": 200}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 260,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "llama": ("LlamaConfig", _UNEVEN),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_UNEVEN,
            **_EXPERTS,
            "moe_intermediate_size": 136,
            "shared_expert_intermediate_size": 150,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SMALL, **_EXPERTS, "head_dim": 16, "decoder_sparse_step": 1}),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_UNEVEN,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {**_SMALL, "pad_token_id": 0}),
    "gemma2": ("Gemma2Config", {**_SMALL, "head_dim": 16}),
    "qwen3": ("Qwen3Config", {**_SMALL, "head_dim": 16}),
    "gpt2": ("GPT2Config", {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
ARCHITECTURES = tuple(CONFIGS)
#: GPT-2 has nothing but Conv1D layers, which stay
QUANTIZED = tuple(name for name in CONFIGS if name != "gpt2")
#: nvfp4 takes none of most models' sides here: see test_transformers_nvfp4.py
SCHEMES = tuple(scheme for scheme in schemes.SCHEMES if scheme != "nvfp4")

by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
by_quantized = pytest.mark.parametrize("architecture", QUANTIZED)
by_scheme = pytest.mark.parametrize("scheme", SCHEMES)
#: of linear layers, of stacks of experts, and of stacks that are transposed
KINDS = ("llama", "qwen2_moe", "gpt_oss")


def by_case(architectures: Sequence[str]) -> pytest.MarkDecorator:
    """Every architecture in the default scheme, and every scheme in models of each of `KINDS`."""
    schemes_of = {name: SCHEMES if name in KINDS else (DEFAULT_SCHEME,) for name in architectures}
    cases = [(name, scheme) for name, those in schemes_of.items() for scheme in those]
    return pytest.mark.parametrize(("architecture", "scheme"), cases)


def make_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random checkpoint of architecture ``name``; every parameter (norms and biases too) is random."""
    class_name, options = CONFIGS[name]
    model = random_model(class_name, {**options, **changes}, dtype, uneven_rows=False)
    model.generation_config.max_new_tokens = 7  # something to be found again after loading
    model.save_pretrained(folder)
    return folder


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, tied ones once."""
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@functools.cache
def prompt() -> Tensor:
    """Two rows of token ids that every vocabulary above holds: int64[2, 24]."""
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))


def stacks_of(model: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    return [found for found in quantized_weights(model) if not found[0].endswith(".weight")]


def is_transposed(model: Any, name: str) -> bool:
    return bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(prompt()).logits


class Checkpoints:
    """Tiny checkpoints and models loaded from them, each made once a session. Tests must not change the models."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = functools.cache(self._folder)
        self.load = functools.cache(self._load)

    def _folder(self, architecture: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        return make_checkpoint(architecture, self.root / f"{architecture}-{dtype}", dtype)

    def _load(self, architecture: str, scheme: str | None, dtype: torch.dtype | None = None) -> Any:
        return octavo.load(self.folder(architecture), scheme=scheme, dtype=dtype)
