"""SGLang's whole engine on a CPU: what it answers through octavo is what it answers with octavo's conversion."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from helpers.sglang_checkpoints import convert, make
from helpers.sglang_engine import run
from helpers.sglang_loading import Job, octavo_job

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_tokens_and_logprobs_are_those_of_the_conversion(scheme: str, tmp_path: Path) -> None:
    if not importlib.metadata.version("sglang").startswith("0.5.15"):
        pytest.skip("the stand-ins for kernels are those of SGLang 0.5.15's engine")
    source = make("qwen3_moe", tmp_path / "bf16")
    mine, stock = run(octavo_job(source, scheme)), run(Job(convert(source, scheme)))
    for answer in (mine, stock):
        assert not answer.error, answer.output[-4000:]
        assert [len(tokens) for tokens in answer.tokens] == [8, 8]
    assert (mine.tokens, mine.logprobs) == (stock.tokens, stock.logprobs)
