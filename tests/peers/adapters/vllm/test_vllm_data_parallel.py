"""Two engines of vLLM side by side, data parallel: each has half of the experts, and a copy of all else.

They are loaded, and don't run: what hands tokens to experts of the other is not there in vLLM's engine for CPUs
(`all_gatherv`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]


def test_two_replicas_with_experts_apart_equal_stock_vllm_on_the_converted_checkpoint(tmp_path: Path) -> None:
    source = make("qwen2_moe wide", tmp_path / "bf16")
    schemes, apart = ["fp8_channel", "fp8_block"], {"enable_expert_parallel": True}
    jobs = [
        job
        for scheme in schemes
        for job in (octavo_job(source, scheme, **apart), Job(convert(source, scheme), dict(apart)))
    ]
    for job in jobs:
        job.loaded = True
    answers = run(*jobs, replicas=2, timeout=800)
    for scheme, mine, stock in zip(schemes, answers[::2], answers[1::2], strict=True):
        assert not mine.error, mine.output[-4000:]
        assert not stock.error, stock.output[-4000:]
        assert len(mine.parameters) == 2
        assert mine.parameters == stock.parameters
        differ = {name for name, digest in mine.parameters[0].items() if digest != mine.parameters[1][name]}
        assert differ
        assert all(".experts." in name for name in differ)
        for line in mine.log[0], mine.log[len(mine.log) // 2]:
            assert f"10 layers (26 tensors) became {scheme}" in line
        assert mine.output.count("not read: 12 (") == 2  # two experts of four, each of three matrices, in two layers
