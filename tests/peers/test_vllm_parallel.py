"""Two ranks of vLLM's CPU engine, and its OpenAI server.

Scales are taken over whole tensors of the checkpoint, so each rank's bytes are parts of those on disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import ENVIRONMENT, PROMPTS, Job, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

EXPERT_PARALLEL = {"enable_expert_parallel": True}


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("llama wide", "fp8_channel", {}),
        ("llama wide", "fp8_block", {}),
        ("qwen2_moe wide", "fp8_channel", {}),
        ("qwen2_moe wide", "fp8_block", {}),
        ("qwen2_moe wide", "fp8_channel", EXPERT_PARALLEL),
        ("qwen2_moe wide", "fp8_block", EXPERT_PARALLEL),
    ],
)
def test_two_ranks_equal_stock_vllm_on_the_converted_checkpoint(
    name: str, scheme: str, options: dict[str, Any], tmp_path: Path
) -> None:
    source = make(name, tmp_path / "bf16")
    two = {"tensor_parallel_size": 2, **options}
    (mine,) = run(octavo_job(source, scheme, **two), timeout=400)
    (stock,) = run(Job(convert(source, scheme), two), timeout=400)
    assert not mine.error, mine.output[-2500:]
    assert not stock.error, stock.output[-2500:]
    assert len(mine.parameters) == 2
    assert mine.parameters[0] != mine.parameters[1]
    assert mine.parameters == stock.parameters
    assert mine.tokens == stock.tokens
    assert mine.logprobs == stock.logprobs
    # all of each kind of layer: qkv, o, gate_up, down; experts and a shared expert besides
    assert f"{8 if name == 'llama wide' else 10} layers" in mine.log[0]
    if options:  # two experts of four, each of three matrices, in two layers, are the other rank's
        assert "not read: 12 (" in mine.output


def test_the_quantization_flag_and_usual_options_on_two_ranks(tmp_path: Path) -> None:
    source = make("opt", tmp_path / "bf16")
    usual = {
        "tensor_parallel_size": 2,
        "block_size": 128,
        "gpu_memory_utilization": 0.2,
        "trust_remote_code": True,
        "max_model_len": 128,
    }
    (mine,) = run(Job(source, {"quantization": "octavo_fp8_channel", **usual}), timeout=400)
    (stock,) = run(Job(convert(source, "fp8_channel"), usual), timeout=400)
    assert not mine.error, mine.output[-2500:]
    assert mine.parameters == stock.parameters
    assert (mine.tokens, mine.logprobs) == (stock.tokens, stock.logprobs)


@contextlib.contextmanager
def served(model: Path, *arguments: str) -> Iterator[str]:
    """The address of an OpenAI server; it is asked to stop, and must."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the `vllm` command of the CPU wheel asks for metadata of a package named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    options = ["--host", "127.0.0.1", "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64"]
    server = subprocess.Popen(
        [*command, *options, *arguments],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            assert server.poll() is None, server.communicate()[0][-2500:]
            time.sleep(1)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            output, _ = server.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            output, _ = server.communicate()
            raise AssertionError(output[-2500:]) from None
    assert "layers (14 tensors) became fp8_channel" in output


def test_the_openai_server_starts_answers_and_stops(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    (reference,) = run(octavo_job(source))
    body = {
        "model": str(source),
        "prompt": PROMPTS[0],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
    }
    with served(source, "--load-format", "octavo", "--dtype", "bfloat16") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    assert answer["choices"][0]["token_ids"] == reference.tokens[0]
