"""A plan that is remembered gives SGLang's models the bytes that they had."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sglang_checkpoints import make as deepseek
from helpers.sglang_loading import load, octavo_job
from helpers.vllm_checkpoints import make

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("sglang_loads"),
]


def test_a_second_start_uses_the_plan_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    jobs = [
        octavo_job(make("llama wide", tmp_path / "dense"), "fp8_channel"),
        octavo_job(make("qwen2_moe wide", tmp_path / "experts"), "fp8_block"),
        octavo_job(make("qwen3_moe", tmp_path / "table"), "fp8_channel"),  # its loader leaves a table to be made later
        octavo_job(deepseek("deepseek_v2", tmp_path / "computed"), "fp8_channel"),  # and this one computes of weights
    ]
    first, times = load(*jobs), []
    for entry in (tmp_path / "cache" / "plans").iterdir():
        times.append(entry.stat().st_ctime_ns)
    second = load(*jobs)
    entries = [*(tmp_path / "cache" / "plans").iterdir()]
    # each was found, which notes that it is used, and none was made anew
    assert (len(times), len(entries)) == (len(jobs), len(jobs))
    assert all(entry.stat().st_ctime_ns > max(times) for entry in entries)
    for before, after in zip(first, second, strict=True):
        assert not before.error
        assert (before.loaded, before.served) == (after.loaded, after.served)
