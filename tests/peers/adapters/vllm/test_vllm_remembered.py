"""A plan that is remembered gives vLLM's models the bytes that they had, at their loading and at their reloading."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.vllm_checkpoints import make
from helpers.vllm_engine import octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_engine"),
]

#: architecture, scheme, ranks
CASES = [
    ("llama wide", "fp8_channel", 1),  # rows that pad the vocabulary
    ("smollm2", "fp8_block", 1),  # a layer that does not fit
    ("qwen2_moe wide", "fp8_channel", 2),  # columns
    ("gpt_oss", "fp8_channel", 1),  # layers that have to stay
    ("granitemoe", "fp8_block", 1),  # stacks of experts
    ("deepseek_v3", "fp8_channel", 1),  # a loader that sets an attribute
]


def test_a_second_start_asks_no_loader_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    jobs = []
    for name, scheme, ranks in CASES:
        source = tmp_path / name
        options = {"tensor_parallel_size": ranks, "rank": ranks - 1}
        steps = [["reload", str(source)]] if name == "llama wide" else []
        jobs.append(octavo_job(source if source.exists() else make(name, source), scheme, steps, **options))
    first, second = load(*jobs), load(*jobs)
    said = "plan remembered from an earlier start"
    assert (first[0].output.count(said), second[0].output.count(said)) == (0, len(jobs))
    for case, before, after in zip(CASES, first, second, strict=True):
        assert not before.error, case
        assert before.parameters == after.parameters, case
        assert before.results == after.results, case
    assert second[0].results[0] == [second[0].parameters[0], True]
