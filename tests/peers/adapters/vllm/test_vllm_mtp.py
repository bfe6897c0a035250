"""Layers of a checkpoint that draft for it, loaded by octavo, are those that stock vLLM has of the converted one."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.vllm_checkpoints import make, with_mtp
from helpers.vllm_engine import Job, octavo_job, run
from helpers.vllm_loading import load
from helpers.vllm_reading import convert_for
from octavo.adapters.vllm.reader import VllmReader

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_loads")]

MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "no copies"])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_draft_is_filled_with_or_without_copies_of_embedding_and_head(
    name: str, copies: bool, tmp_path: Path
) -> None:
    source = with_mtp(make(name, tmp_path / "bf16"), copies=copies)
    out, _ = convert_for(VllmReader(), source)
    steps = [["draft"]]
    mine, stock = load(octavo_job(source, steps=steps, **MTP), Job(out, MTP, steps), timeout=500)
    for answer in (mine, stock):
        assert not answer.error, answer.output[-4000:]
    assert mine.parameters == stock.parameters
    shared = () if copies else ("embed_tokens", "shared_head.head")  # which nothing has filled
    given = {n: d for n, d in stock.results[0].items() if not any(part in n for part in shared)}
    assert given.items() <= mine.results[0].items()
    assert sum("float8" in digest for digest in given.values()) > 4


@pytest.mark.usefixtures("vllm_engine")
def test_an_engine_that_drafts_says_what_stock_says_of_the_converted_checkpoint(tmp_path: Path) -> None:
    source = with_mtp(make("glm4_moe", tmp_path / "bf16"))
    out, _ = convert_for(VllmReader(), source)
    mine, stock = run(octavo_job(source, **MTP), Job(out, MTP), timeout=500)
    for answer in (mine, stock):
        assert not answer.error, answer.output[-4000:]
    assert (mine.tokens, mine.logprobs) == (stock.tokens, stock.logprobs)
