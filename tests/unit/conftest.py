"""Fixtures of the unit tests: a checkpoint of every dtype that is quantized, in two shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import random_weights, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint

LAYER = "model.layers.0"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": random_weights((50, 96), torch.bfloat16, 0),
        f"{LAYER}.self_attn.q_proj.weight": random_weights((200, 96), torch.bfloat16, 1),
        f"{LAYER}.mlp.down_proj.weight": random_weights((96, 300), torch.float16, 2),
        f"{LAYER}.mlp.up_proj.weight": random_weights((300, 96), torch.float32, 3),
        f"{LAYER}.mlp.up_proj.bias": random_weights((300,), torch.float32, 4),
        "model.norm.weight": random_weights((96,), torch.bfloat16, 5),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path, tensors, shards=2))
