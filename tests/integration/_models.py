"""Tiny random checkpoints of the architectures that the integration tests cover, and how to compare models.

Everything is made from configs, with transformers alone; nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octavo
from octavo import schemes
from octavo.modules import quantized_weights

transformers = pytest.importorskip("transformers")

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
SCHEMES = tuple(schemes.SCHEMES)

by_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
by_quantized = pytest.mark.parametrize("architecture", QUANTIZED)
by_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def make_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random checkpoint of architecture ``name``; every parameter (norms and biases too) is random."""
    config_class, options = CONFIGS[name]
    config = getattr(transformers, config_class)(**{**options, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.generation_config.max_new_tokens = 7  # something to be found again after loading
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def split_shards(source: Path, target: Path, shard_of: Callable[[str], int], count: int) -> Path:
    """Copy a checkpoint into ``count`` shards and an index; ``shard_of`` says where each tensor goes."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(source)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {name: names[shard_of(name)] for name in tensors}
    for file_name in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file_name}, target / file_name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every byte agree (NaN and signed zeros included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of parameters and buffers that are not bit-equal, or only in one of two models."""
    mine, theirs = state_of(a), state_of(b)
    names = sorted(mine.keys() | theirs.keys())
    return [n for n in names if n not in mine or n not in theirs or not same_bits(mine[n], theirs[n])]


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
