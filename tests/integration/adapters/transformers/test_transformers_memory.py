"""``from_pretrained`` reserves memory for what it has still to load, and finds devices for no more than that.

transformers' own functions do the counting, at their own time within ``from_pretrained``. On a CPU they count nothing,
so the tests tell them that it is an accelerator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _models import Checkpoints, by_architecture, by_scheme, distinct_bytes
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.integrations import accelerate

import octavo
from helpers.folders import tensors_of
from helpers.models import differences
from octavo.adapters.transformers import devices


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each block that transformers reserves before it loads, in a list that grows."""
    blocks: list[int] = []
    warm_up, empty = modeling_utils.caching_allocator_warmup, torch.empty

    def count(*shape: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*shape, **options)
        blocks.append(tensor.nbytes)
        return tensor

    def counted(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(modeling_utils, "is_accelerator_device", lambda device: device != "disk")
            patch.setattr(torch, "empty", count)
            warm_up(*args)

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", counted)
    return blocks


@by_architecture
def test_nothing_is_reserved_for_what_has_been_streamed(
    checkpoints: Checkpoints, architecture: str, reserved: list[int]
) -> None:
    folder, config = checkpoints.folder(architecture), octavo.OctavoConfig()
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    assert reserved == [0]
    # once it is loaded, its parameters have their size again
    sizes, _ = accelerate.compute_module_sizes(model, model.hf_quantizer)
    assert sizes[""] == distinct_bytes([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("architecture", ["opt", "llama", "qwen2_moe", "gpt_oss"])
@by_scheme
def test_what_is_reserved_for_a_saved_model_is_its_size_in_fp8(
    checkpoints: Checkpoints, architecture: str, scheme: str, reserved: list[int], tmp_path: Path
) -> None:
    checkpoints.load(architecture, scheme).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    saved_bytes = sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    assert reserved == [saved_bytes // 2 * 2]  # in elements of two bytes


def test_the_unquantized_model_is_reserved_where_octavo_loads_nothing(
    checkpoints: Checkpoints, reserved: list[int]
) -> None:
    folder = checkpoints.folder("llama")
    AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert reserved == [sum(tensor.nbytes for tensor in tensors_of(folder).values())]


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "opt"])
def test_a_model_that_leaves_little_free_memory_stays_where_it_was_streamed(
    checkpoints: Checkpoints, architecture: str, device_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = checkpoints.load(architecture, "fp8_channel")
    free_bytes = direct.load_report.final_bytes // 2
    monkeypatch.setattr(accelerate, "accelerate_max_memory", lambda given=None: given or {"cpu": free_bytes})
    monkeypatch.setattr(devices, "free_bytes", lambda _: free_bytes)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoints.folder(architecture), quantization_config=octavo.OctavoConfig(), device_map=device_map
    )
    assert differences(model, direct) == []
