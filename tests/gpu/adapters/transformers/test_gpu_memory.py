"""A model loads where there is room for it and for staging, and no more: torch's allocator is given just that."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import octavo
from octavo.choices import DEFAULT_STAGING_BYTES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

#: 2.0 GiB in bf16, 1.0 in FP8: twice the model is four times what staging takes
LLAMA = {
    "vocab_size": 1024,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


QUANTIZING: dict[str, Callable[[Path], Any]] = {
    "octavo.load": lambda folder: octavo.load(folder, device="cuda"),
    **{
        f"from_pretrained to {device_map}": lambda folder, device_map=device_map: from_pretrained(
            folder, quantization_config=octavo.OctavoConfig(), device_map=device_map
        )
        for device_map in ("cuda", "auto")
    },
}
READING_BACK: dict[str, Callable[[Path], Any]] = {
    "octavo.load": lambda folder: octavo.load(folder, device="cuda"),
    "from_pretrained": lambda folder: from_pretrained(folder, device_map="cuda"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint of random weights."""
    return make_source(tmp_path_factory.mktemp("source"), LLAMA, "cuda")


def make_source(folder: Path, options: dict[str, Any], device: str) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**options, architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, saved in FP8."""
    folder = tmp_path_factory.mktemp("saved")
    octavo.load(source, device="cuda").save_pretrained(folder)
    return folder


@contextlib.contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """Let torch's allocator take so much more of the device, and fail beyond that."""
    total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + nbytes) / total_bytes)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def assert_loads_within_its_bound(load: Callable[[Path], Any], folder: Path, final_bytes: int) -> None:
    bound_bytes = int(1.02 * final_bytes) + DEFAULT_STAGING_BYTES
    gc.collect()  # models of earlier tests
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    with room_for(bound_bytes):
        model = load(folder)
        torch.cuda.synchronize()
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert final_bytes <= torch.cuda.memory_allocated() - allocated <= 1.02 * final_bytes
    assert torch.cuda.max_memory_allocated() - allocated <= bound_bytes
    assert torch.cuda.max_memory_reserved() - reserved <= bound_bytes


@pytest.mark.parametrize("way", QUANTIZING)
def test_quantizing_takes_the_fp8_model_and_staging(way: str, source: Path) -> None:
    if way.endswith("auto") and torch.cuda.device_count() > 1:
        pytest.skip("it would be spread over them: see test_gpu_devices")
    final_bytes = octavo.plan(source).final_bytes()
    assert source_bytes(source) > 1.5 * 2**30 > 1.4 * final_bytes
    assert_loads_within_its_bound(QUANTIZING[way], source, final_bytes)


@pytest.mark.parametrize("way", READING_BACK)
def test_reading_back_takes_the_fp8_model_and_staging(way: str, source: Path, saved: Path) -> None:
    assert_loads_within_its_bound(READING_BACK[way], saved, octavo.plan(source).final_bytes())


def source_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size
