"""``config.json`` beside a sound shard: what plans read of it, and the ``quantization_config`` of octavo's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import octavo
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.planning.recipe import Recipe

from ..mutator import Words
from .base import Target, shard_bytes

_WEIGHT = "model.layers.0.up.weight"


class Configs(Target):
    """The text of a config."""

    name = "configs"
    share = 15
    words = Words(
        keys=(
            *("model_type", "architectures", "num_hidden_layers", "hidden_size", "vocab_size", "torch_dtype", "dtype"),
            *(
                "quantization_config",
                "quant_method",
                "scheme",
                "targets",
                "ignore",
                "weights",
                "staging_bytes",
                "threads",
            ),
            *("text_config", "vision_config", "tie_word_embeddings", "auto_map", "config_groups", "format", _WEIGHT),
            *("activation_scheme", "weight_block_size", "modules_to_not_convert"),
        ),
        texts=(
            *("llama", "gpt2", "qwen2_moe", "octavo", "fp8", "compressed-tensors", "gptq", "fp8_channel", "fp8_block"),
            *("fp8_tensor", "mxfp8", "LlamaForCausalLM", "bfloat16", "*.up", "re:.*", _WEIGHT, "dynamic"),
        ),
        numbers=("200000", "4", "32", "32000"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from octavo.adapters.transformers.quantizer import saved_config  # takes seconds: not while an input is judged

        self.saved_config = saved_config
        shard = {_WEIGHT: ("BF16", [4, 32], 256), "model.layers.0.attn.c_attn.weight": ("BF16", [2, 6], 24)}
        (folder / "model.safetensors").write_bytes(shard_bytes(shard))

    def run(self, data: bytes) -> None:
        (self.folder / "config.json").write_bytes(data)
        checkpoint = Checkpoint.open(self.folder)
        if (checkpoint.config.get("quantization_config") or {}).get("quant_method") == "octavo":
            config = self.saved_config(checkpoint, Recipe())
            assert config is not None
            config.to_dict()
            config.swap(_model())
        else:
            formats.recognize(checkpoint)  # as verify does
        octavo.plan(self.folder, model=False).to_dict()


def _model() -> Any:
    """What the config of a saved model is about, without memory."""
    model = torch.nn.Module()
    model.config = SimpleNamespace(name_or_path="model")
    inner = model
    for name in ("model", "layers", "0"):
        inner.add_module(name, torch.nn.Module())
        inner = inner.get_submodule(name)
    inner.add_module("up", torch.nn.Linear(32, 4, bias=False, device="meta", dtype=torch.bfloat16))
    return model
