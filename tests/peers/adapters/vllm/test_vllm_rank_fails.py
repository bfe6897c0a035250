"""A rank of vLLM's CPU engine fails while the other does not: the engine ends, with the error of that rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers.vllm_checkpoints import make
from helpers.vllm_engine import octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("vllm_engine"),
]


def test_a_rank_that_fails_ends_all_with_its_error(tmp_path: Path) -> None:
    """The weight is in rows that the second rank alone reads; the first, which is done, does not wait for it."""
    source = make("llama wide", tmp_path / "bf16")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    row = tensors[name].shape[0] // 2 + 3
    tensors[name][row, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (answer,) = run(octavo_job(source, tensor_parallel_size=2), timeout=250)
    assert answer.error
    assert f"tensor {name!r} holds nan (at [{row}, 5])" in answer.output
    assert not answer.parameters
