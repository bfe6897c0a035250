"""octavo as SGLang finds it: what is loaded, and what is refused, from the arguments of a server on."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sglang_loading import Job, load, octavo_job
from helpers.vllm_checkpoints import convert, make

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_all_tensors_equal_those_of_the_converted_checkpoint(scheme: str, tmp_path: Path) -> None:
    sources = [make(name, tmp_path / name) for name in ("llama", "qwen3_moe")]
    jobs = [(octavo_job(source, scheme), Job(convert(source, scheme))) for source in sources]
    flag = Job(sources[0], {"quantization": f"octavo_{scheme}"})
    mine, stock, mine_moe, stock_moe, flagged = load(*jobs[0], *jobs[1], flag)
    for answer in (mine, stock, mine_moe, stock_moe, flagged):
        assert not answer.error, answer.error
        assert answer.quantization == "compressed-tensors"
    assert any("float8_e4m3fn" in digest for digest in stock.loaded.values())
    assert mine.loaded == flagged.loaded == stock.loaded
    assert mine.served == flagged.served == stock.served
    assert mine_moe.loaded == stock_moe.loaded
    assert mine_moe.served == stock_moe.served
