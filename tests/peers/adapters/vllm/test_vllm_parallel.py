"""Two ranks of vLLM's CPU engine, and its OpenAI server.

Scales are taken over whole tensors of the checkpoint, so each rank's bytes are parts of those on disk.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.vllm_checkpoints import convert, make
from helpers.vllm_command import vllm_command
from helpers.vllm_engine import PROMPTS, Answer, Job, free_port, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("vllm_engine"),
]

TWO = {"tensor_parallel_size": 2}
EXPERTS = {"enable_expert_parallel": True}
USUAL = {"block_size": 64, "gpu_memory_utilization": 0.2, "trust_remote_code": True, "max_model_len": 128}
#: -> architecture, scheme, layers of vLLM that hold FP8 (see test_vllm_models.py), options beside two ranks
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "llama channel": ("llama wide", "fp8_channel", 8, {}),
    "llama block": ("llama wide", "fp8_block", 8, {}),
    "moe channel": ("qwen2_moe wide", "fp8_channel", 10, {}),
    "moe block": ("qwen2_moe wide", "fp8_block", 10, {}),
    "moe channel, experts apart": ("qwen2_moe wide", "fp8_channel", 10, EXPERTS),
    "moe block, experts apart": ("qwen2_moe wide", "fp8_block", 10, EXPERTS),
    "usual options": ("opt", "fp8_channel", 8, USUAL),
}


def mine_of(source: Path, scheme: str, options: dict[str, Any]) -> Job:
    """octavo's, by its load format or, where the usual options are given, by the quantization flag."""
    if options is USUAL:
        return Job(source, {"quantization": f"octavo_{scheme}", **TWO, **options})
    return octavo_job(source, scheme, **TWO, **options)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Of octavo on the bf16 checkpoint and of stock vLLM on the converted one, each with two ranks."""
    root = tmp_path_factory.mktemp("parallel")
    sources = {name: make(name, root / name) for name in {case[0] for case in CASES.values()}}
    converted = {pair: convert(sources[pair[0]], pair[1]) for pair in {case[:2] for case in CASES.values()}}
    jobs = []
    for name, scheme, _, options in CASES.values():
        jobs += [mine_of(sources[name], scheme, options), Job(converted[name, scheme], {**TWO, **options})]
    found = run(*jobs, timeout=1700)
    return dict(zip(CASES, zip(found[::2], found[1::2], strict=True), strict=True))


def test_what_does_not_fit_a_rank_stays_on_both(tmp_path: Path) -> None:
    """Of 128 rows of q, k, v, of 128 columns of o and of the sides of experts, a rank has 64."""
    (answer,) = run(octavo_job(make("qwen2_moe", tmp_path / "bf16"), "fp8_block", **TWO), timeout=900)
    assert not answer.error, answer.output[-4000:]
    assert [len(tokens) for tokens in answer.tokens] == [8, 8]
    shared = {
        f"model.layers.{n}.mlp.shared_expert.{name}.weight" for n in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    for rank in answer.parameters:
        assert {name for name, digest in rank.items() if "float8_e4m3fn" in digest} == shared


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_stock_vllm_on_the_converted_checkpoint(
    case: str, answers: dict[str, tuple[Answer, Answer]]
) -> None:
    _, scheme, layers, options = CASES[case]
    mine, stock = answers[case]
    assert not mine.error, mine.output[-2500:]
    assert not stock.error, stock.output[-2500:]
    assert len(mine.parameters) == 2
    assert mine.parameters[0] != mine.parameters[1]
    assert mine.parameters == stock.parameters
    assert mine.tokens == stock.tokens
    assert mine.logprobs == stock.logprobs
    assert f"{layers} layers" in mine.log[0]
    assert f"became {scheme}" in mine.log[0]
    assert "vLLM's own loader" not in mine.output  # all is streamed to its place, columns too
    if options is EXPERTS:  # two experts of four, each of three matrices, in two layers, are the other rank's
        assert "not read: 12 (" in mine.output


@contextlib.contextmanager
def served(model: Path, scratch: Path, *arguments: str) -> Iterator[str]:
    """The address of an OpenAI server; it is asked to stop, and must."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64"]
    command, environment = vllm_command("serve", str(model), "--port", str(port), *options, *arguments, scratch=scratch)
    server = subprocess.Popen(
        command,
        env=environment,
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
    with served(source, tmp_path / "scratch", "--load-format", "octavo", "--dtype", "bfloat16") as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    assert answer["choices"][0]["token_ids"] == reference.tokens[0]


def test_the_command_says_what_is_wrong_with_an_option_and_ends(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    options = ["--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64", "--dtype", "bfloat16"]
    extra = ["--load-format", "octavo", "--model-loader-extra-config", '{"shceme": "fp8_block"}']
    command, environment = vllm_command("serve", str(source), *options, *extra, scratch=tmp_path / "scratch")
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 1
    assert "unknown key 'shceme'; known: scheme, format, ignore" in output
    before, _, _ = output.partition("Traceback")
    assert "octavo: " in before
    assert "unknown key 'shceme'" in before
