"""Stages of a pipeline, each with some of the layers: what each holds is what it holds of the conversion."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from helpers.sglang_loading import Job, load_ranks, octavo_job
from helpers.vllm_checkpoints import convert, make

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]


def test_two_stages_hold_what_they_hold_of_the_conversion(tmp_path: Path) -> None:
    if not importlib.metadata.version("sglang").startswith("0.5.15"):
        pytest.skip("the harness makes groups of stages as SGLang 0.5.15 does")
    source, stages = make("qwen2_moe", tmp_path / "bf16"), {"pp_size": 2}
    converted = convert(source, "fp8_channel")
    mine, stock = load_ranks(2, octavo_job(source, **stages), Job(converted, stages))
    for answer in (*mine, *stock):
        assert not answer.error, answer.output[-4000:]
    assert [answer.served for answer in mine] == [answer.served for answer in stock]
    first, second = ({name for name in answer.served if ".layers." in name} for answer in mine)
    assert first
    assert second
    assert not first & second
