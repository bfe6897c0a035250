"""Models of vLLM in the process of the tests: made by vLLM, loaded by whom a test says, never run.

A test module that imports this one is skipped where there is no vLLM.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's warnings are its own
    vllm = pytest.importorskip("vllm")
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

Pairs = Iterable[tuple[str, Tensor]]
VERSION: tuple[int, int] = vllm.__version_tuple__[:2]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """What models of vLLM want to find: a group of processes, here of one."""
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def config_of(folder: Path, quantization: str | None = None) -> VllmConfig:
    """vLLM's configuration for a bf16 checkpoint, or for its own online quantization of it."""
    model = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, quantization=quantization
    )
    return VllmConfig(model_config=model, load_config=LoadConfig(), device_config=DeviceConfig(device="cpu"))


def build(folder: Path) -> nn.Module:
    """The model of a checkpoint, unquantized, not loaded."""
    with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
        model: nn.Module = initialize_model(config_of(folder))
    return model


class FromPairs(BaseModelLoader):
    """vLLM's way of loading a model, of which only the source of the weights is ours."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(LoadConfig())
        self._pairs = pairs

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        model.load_weights(iter(self._pairs))
