"""Tiny checkpoints of vision-language models with experts in stacks, in the names and layouts of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folders import edit_tensors
from .vllm_checkpoints import SMALL

_TEXT = {**SMALL, "head_dim": 32}


def llama4(folder: Path, seed: int = 0) -> Path:
    """As Llama-4 Scout is published: every layer has experts, in stacks of [experts, in, out]."""
    text = {**_TEXT, "intermediate_size_mlp": 256, "num_local_experts": 4, "num_experts_per_tok": 1}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 56, "patch_size": 14, "vision_output_dim": 128}
    vision |= {"projector_input_dim": 128, "projector_output_dim": 128}
    options = {"text_config": {**text, "interleave_moe_layer_step": 1}, "vision_config": vision}
    return _save("Llama4", options, folder, seed)


def qwen3_vl_moe(folder: Path, seed: int = 0) -> Path:
    """As Qwen3-VL-MoE is published: stacks of [experts, in, out], which transformers has the other way since."""
    text = {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
    vision = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128}
    vision |= {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    _save("Qwen3VLMoe", {"text_config": text, "vision_config": vision}, folder, seed)

    def transpose(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: stack.transpose(1, 2) for name, stack in tensors.items() if ".experts." in name})

    return edit_tensors(folder, transpose)


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """As Qwen2.5-VL is published: `visual.` and `model.layers.`, which transformers calls otherwise since."""
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}}
    vision = {"depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 128}
    vision |= {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 112}
    return _save("Qwen2_5_VL", {"text_config": text, "vision_config": vision}, folder, seed)


def as_trainer_sends(folder: Path) -> Path:
    """Rename what is in the hub's layout to what a model of transformers calls its parameters."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            ours = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
            tensors["model." + name if name.startswith("visual.") else ours] = tensors.pop(name)

    return edit_tensors(folder, rename)


def _save(family: str, options: dict[str, Any], folder: Path, seed: int) -> Path:
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options, dtype="bfloat16")
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder
