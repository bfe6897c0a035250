"""Checkpoints that are quantized already, read by ``--load-format octavo`` as what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


def in_blocks(name: str, folder: Path) -> Path:
    plain = make(name, folder / "bf16")
    config = json.loads((plain / "config.json").read_text())
    stored = fine_grained(tensors_of(plain))
    return write_checkpoint(folder / "fp8", stored, config={**config, "quantization_config": FINE_GRAINED})


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "fp8_channel"), ("deepseek_v3", "fp8_block"), ("qwen3_moe", "fp8_channel")],
)
def test_parameters_equal_those_of_the_converted_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    source = in_blocks(name, tmp_path)
    mine, stock = load(octavo_job(source, scheme), Job(convert(source, scheme)), timeout=500)
    for answer in (mine, stock):
        assert not answer.error, answer.error
    assert any("float8_e4m3fn" in digest for digest in stock.parameters[0].values())
    assert mine.parameters == stock.parameters
