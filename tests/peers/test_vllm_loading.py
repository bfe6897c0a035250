"""Loading alone, with whatever vLLM is installed: also the oldest supported, whose kernels need another torch.

make peers-vllm VLLM=0.24.0
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.folders import edit_tensors
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("smollm2", "fp8_channel"),
        ("opt", "fp8_channel"),
        ("llama", "fp8_channel"),
        ("llama", "fp8_block"),
        ("qwen2_moe", "fp8_channel"),
        ("mixtral", "fp8_channel"),
        ("qwen3_moe", "fp8_channel"),
        ("phi3", "fp8_block"),
    ],
)
def test_parameters_equal_those_of_the_converted_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "bf16")
    flag = Job(source, {"quantization": f"octavo_{scheme}"})
    mine, flagged, stock = load(octavo_job(source, scheme), flag, Job(convert(source, scheme)), timeout=500)
    for answer in (mine, flagged, stock):
        assert not answer.error, answer.error
    assert any("float8_e4m3fn" in digest for digest in stock.parameters[0].values())
    assert mine.parameters == flagged.parameters == stock.parameters


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_reloading_equals_a_fresh_load_in_the_same_memory(scheme: str, tmp_path: Path) -> None:
    old, new = make("llama", tmp_path / "old"), make("llama", tmp_path / "new", seed=1)
    steps = [["reload", str(new)], ["reload", str(old)]]
    mine, fresh = load(octavo_job(old, scheme, steps), octavo_job(new, scheme))
    assert not mine.error, mine.error
    assert mine.parameters != fresh.parameters
    assert mine.results == [[fresh.parameters[0], True], [mine.parameters[0], True]]


def test_stacks_of_experts_stay_where_the_loader_takes_no_scales(tmp_path: Path) -> None:
    (answer,) = load(octavo_job(make("granitemoe", tmp_path / "bf16")))
    assert not answer.error, answer.error
    experts = [digest for name, digest in answer.parameters[0].items() if ".experts." in name and "_weight" in name]
    assert len(experts) == 4
    assert all("bfloat16" in digest for digest in experts)


def test_half_a_layer_is_named(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "bf16")
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    (answer,) = load(octavo_job(folder))
    assert "(only model.layers.1.mlp.gate_proj.weight goes there)" in answer.error
    assert not answer.parameters
