"""Random models of transformers, their checkpoints, and how to compare models. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import same_bytes


def random_model(
    class_name: str,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    *,
    uneven_rows: bool = True,
) -> Any:
    """The model of a config's class; every parameter is random, norms and biases too, rows of different magnitudes."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, class_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if uneven_rows and parameter.ndim >= 2:
                parameter.mul_(1 + torch.rand(parameter.shape[-2], 1))
    return model


def add_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer that knows every byte, and has a word for each other number, so that all can be read and said."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġ{number}" for number in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that no checkpoint holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of parameters and buffers that are not bit-equal, or only in one of two models."""
    mine, theirs = state_of(a), state_of(b)
    names = sorted(mine.keys() | theirs.keys())
    return [n for n in names if n not in mine or n not in theirs or not same_bytes(mine[n], theirs[n])]
