"""vLLM's engine on a GPU, fed by octavo, against stock vLLM on the FP8 checkpoint that octavo writes: bit for bit."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job, run

sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))
import _engines
import _vllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.peers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

OPTIONS = {"attention_backend": "TRITON_ATTN", "kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.3}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin is found, and nothing is compiled for minutes."""
    path = [
        str(_engines.plugin_path(tmp_path, _vllm.PLUGINS, _vllm.PLUGIN)),
        str(Path(__file__).parents[4] / "src"),
        os.environ.get("PYTHONPATH", ""),
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    for name, value in {**_vllm.ENVIRONMENT, "VLLM_USE_DEEP_GEMM": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_octavo_in_vllm_equals_stock_vllm_on_the_converted_checkpoint(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "bf16")
    schemes = ["fp8_channel", "fp8_block"]
    jobs = [
        job
        for scheme in schemes
        for job in (octavo_job(source, scheme, **OPTIONS), Job(convert(source, scheme), OPTIONS))
    ]
    answers = run(*jobs, timeout=800)
    for scheme, mine, stock in zip(schemes, answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.output[-4000:]
        assert not stock.error, stock.output[-4000:]
        assert f"became {scheme}" in mine.log[0]
        assert mine.parameters == stock.parameters
        assert any("float8_e4m3fn" in digest for rank in mine.parameters for digest in rank.values())
        assert mine.tokens == stock.tokens
        assert mine.logprobs == stock.logprobs


def test_experts_in_stacks_are_streamed_to_their_place(tmp_path: Path) -> None:
    (mine,) = run(octavo_job(make("granitemoe", tmp_path / "bf16"), **OPTIONS), timeout=800)
    assert not mine.error, mine.output[-4000:]
    assert "became fp8_channel" in mine.log[0]
    assert "vLLM's own loader" not in mine.output


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("apart", [False, True], ids=["experts cut", "experts apart"])
def test_two_ranks_on_two_gpus_equal_those_of_stock_vllm_on_the_converted_checkpoint(
    apart: bool, tmp_path: Path
) -> None:
    source = make("qwen2_moe wide", tmp_path / "bf16")
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": apart, "disable_custom_all_reduce": True}
    options = {**OPTIONS, **ranks}
    schemes = ["fp8_channel", "fp8_block"]
    jobs = [
        job
        for scheme in schemes
        for job in (octavo_job(source, scheme, **options), Job(convert(source, scheme), options))
    ]
    answers = run(*jobs, timeout=800)
    for scheme, mine, stock in zip(schemes, answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.output[-4000:]
        assert not stock.error, stock.output[-4000:]
        assert f"became {scheme}" in mine.log[0]
        assert "vLLM's own loader" not in mine.output  # all is streamed to its place, columns too
        assert len(mine.parameters) == 2
        assert mine.parameters == stock.parameters
        assert mine.tokens == stock.tokens


def test_an_engine_that_sleeps_wakes_up_with_its_weights(tmp_path: Path) -> None:
    old, new = make("qwen2_moe", tmp_path / "old"), make("qwen2_moe", tmp_path / "new", seed=1)
    steps: list[list[Any]] = [["state"]]
    for step in (["nap", 1, ""], ["nap", 2, str(old)], ["reload_path", str(new)], ["nap", 2, str(old)]):
        steps += [step, ["state"]]
    (mine,) = run(octavo_job(old, "fp8_block", steps, enable_sleep_mode=True, **OPTIONS), timeout=400)
    assert not mine.error, mine.output[-4000:]
    first, *states = mine.results[::2]
    assert mine.results[1::2] == [""] * 4
    assert [state["addresses"] == first["addresses"] for state in states] == [True] * 4
    assert [state["tokens"] == first["tokens"] for state in states] == [True, True, False, True]
    assert [_weights(state) == _weights(first) for state in states] == [True, True, False, True]


def _weights(state: dict[str, Any]) -> dict[str, str]:
    """Digests of all but the scales of attention: vLLM 0.24 does not bring those back, which are parameters there.

    Only caches in FP8 use them, and with those it sets them to 1 (`GPUModelRunner.init_fp8_kv_scales`).
    """
    (rank,) = state["parameters"]
    return {name: digest for name, digest in rank.items() if not name.endswith(("._q_scale", "._k_scale", "._v_scale"))}
