"""``config.json`` of a small model, which transformers reads and builds without memory, to plan a load."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import octavo

from ..jsontext import Object, tree_of
from ..mutator import Words
from .base import Target, shard_bytes

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
_SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.norm.weight": (8,),
}


class Models(Target):
    """The text of a config."""

    name = "models"
    share = 2
    words = Words(
        keys=(
            *_CONFIG,
            *("rope_scaling", "head_dim", "attention_bias", "mlp_bias", "pad_token_id", "auto_map", "layer_types"),
            *(
                "sliding_window",
                "quantization_config",
                "text_config",
                "num_local_experts",
                "num_experts",
                "initializer_range",
            ),
        ),
        texts=(
            *(
                "llama",
                "mistral",
                "qwen2",
                "qwen3_moe",
                "mixtral",
                "gpt2",
                "bert",
                "LlamaForCausalLM",
                "BertModel",
                "silu",
            ),
            *(
                "gelu",
                "bfloat16",
                "float32",
                "torch.float16",
                "float8_e4m3fn",
                "int8",
                "full_attention",
                "default",
                "yarn",
            ),
        ),
        numbers=("8", "12", "16", "200000", "1e-6"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        numel = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in _SHAPES.items()}
        tensors = {name: ("BF16", shape, 2 * numel[name]) for name, shape in _SHAPES.items()}
        (folder / "model.safetensors").write_bytes(shard_bytes(tensors))
        self.run(json.dumps(_CONFIG).encode())  # imports what takes seconds

    def run(self, data: bytes) -> None:
        (self.folder / "config.json").write_bytes(data)
        octavo.plan(self.folder, model=True).to_dict()

    def repaired(self, tree: Any, random: Random) -> Any:
        """Mostly a config that is sound but for one or two keys."""
        if not isinstance(tree, Object) or random.random() < 0.2:
            return tree
        sound = tree_of(_CONFIG)
        for key, value in tree[:: random.choice((1, 2, 5))]:
            if isinstance(key, str) and random.random() < 0.7:
                sound.set(key, value)
        return sound
