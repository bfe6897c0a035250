"""Each rank of several holds what stock vLLM's rank makes of the converted checkpoint, streamed to its place.

Ranks are loaded one after another, in one process: see `test_vllm_parallel` for two that run together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, octavo_job
from helpers.vllm_loading import load
from helpers.vllm_reading import convert_for
from octavo.adapters.vllm.reader import VllmReader

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_engine"),
]

#: architecture, scheme, ranks, whether experts go to ranks whole
CASES = [
    ("llama wide", "fp8_channel", 2, False),
    ("llama wide", "fp8_block", 2, False),
    ("llama wide", "fp8_channel", 8, False),  # four key heads: two ranks have the same
    ("opt", "fp8_channel", 2, False),  # biases, and a head that is the embedding
    ("phi3", "fp8_channel", 2, False),  # q, k and v are one tensor
    ("gemma3", "fp8_channel", 4, False),
    ("qwen2_moe wide", "fp8_channel", 2, False),
    ("qwen2_moe wide", "fp8_block", 2, False),
    ("qwen2_moe wide", "fp8_channel", 2, True),
    ("qwen2_moe wide", "fp8_block", 2, True),
    ("qwen2_moe wide", "fp8_channel", 4, False),
    ("mixtral", "fp8_channel", 2, False),
    ("mixtral", "fp8_channel", 4, True),
    ("deepseek_v2", "fp8_channel", 2, False),
    ("granitemoe wide", "fp8_channel", 2, False),  # experts in stacks
    ("granitemoe wide", "fp8_block", 2, False),
    ("granitemoe wide", "fp8_channel", 2, True),
]


def name_of(case: tuple[Any, ...]) -> str:
    name, scheme, ranks, apart = case
    return f"{name}, {scheme}, {ranks} ranks{', experts apart' * apart}"


def _converted(source: Path, scheme: str) -> Path:
    """The checkpoint that octavo writes. Stacks are cut into experts by names that this vLLM knows: it is asked."""
    if not source.name.startswith("granitemoe"):
        return convert(source, scheme)
    again = shutil.copytree(source, source.with_name(f"{source.name} {scheme}"))
    return convert_for(VllmReader(), again, scheme)[0]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Answer, Answer]]]:
    """Of octavo on the bf16 checkpoint and of stock vLLM on the converted one: the first rank and the last."""
    root = tmp_path_factory.mktemp("ranks")
    sources = {name: make(name, root / name) for name in {case[0] for case in CASES}}
    converted: dict[tuple[str, str], Path] = {}
    jobs = []
    for name, scheme, ranks, apart in CASES:
        if (name, scheme) not in converted:
            converted[name, scheme] = _converted(sources[name], scheme)
        for rank in (0, ranks - 1):
            options = {"tensor_parallel_size": ranks, "rank": rank, "enable_expert_parallel": apart}
            jobs += [octavo_job(sources[name], scheme, **options), Job(converted[name, scheme], dict(options))]
    found = load(*jobs, timeout=500)
    pairs = list(zip(found[::2], found[1::2], strict=True))
    return {name_of(case): pairs[2 * number : 2 * number + 2] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", [name_of(case) for case in CASES])
def test_a_rank_equals_stock_vllms_on_the_converted_checkpoint(
    case: str, answers: dict[str, list[tuple[Answer, Answer]]]
) -> None:
    for mine, stock in answers[case]:
        assert not mine.error
        assert not stock.error
        assert mine.parameters == stock.parameters
    first, last = answers[case]
    assert first[0].parameters != last[0].parameters


def test_nothing_of_them_goes_through_vllms_own_loader(answers: dict[str, list[tuple[Answer, Answer]]]) -> None:
    loaded = [mine for pairs in answers.values() for mine, _ in pairs if not mine.error]
    mine = loaded[0]  # whose output is that of all
    assert mine.output.count("became fp8_") >= len(loaded)
    assert "vLLM's own loader" not in mine.output
