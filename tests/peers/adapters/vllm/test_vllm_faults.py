"""Spoiled checkpoints and contradictory options: octavo says what is wrong, by name, before vLLM serves anything.

Each spoiled checkpoint is also given to stock vLLM with its online quantization. What that does is written down here,
so that a version that does better is noticed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import spoiling
from helpers.spoiling import replace, spoil
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

SPOILED = {
    **spoiling.SPOILED,
    "an expert without one matrix": (
        "qwen2_moe",
        spoiling.EXPERT,
        "model.layers.0.mlp.experts.routed_experts.w2_weight [4, 128, 128]: only",
    ),
    "a misspelt name": (
        "llama",
        spoiling.MISSPELT,
        "does not take the tensor 'model.layers.0.self_attn.q_porj.weight'",
    ),
    "a matrix of another size": (
        "llama",
        replace("model.layers.0.self_attn.k_proj.weight", lambda t: t[:64]),
        "model.layers.0.self_attn.k_proj.weight",
    ),
}
#: with all others, stock vLLM 0.32 starts and answers
REFUSED_BY_VLLM = {"a misspelt name", "a matrix of another size", "half a download", "a shard that is missing"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Of octavo and of stock vLLM."""
    folders = spoil(SPOILED, tmp_path_factory.mktemp("spoiled"), make)
    found = run(
        *(job for f in folders for job in (octavo_job(f), Job(f, {"quantization": "fp8_per_block"}))), timeout=850
    )
    return dict(zip(SPOILED, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("what", SPOILED)
def test_octavo_stops_a_spoiled_checkpoint_and_names_it(what: str, answers: dict[str, tuple[Answer, Answer]]) -> None:
    mine, stock = answers[what]
    assert SPOILED[what][2] in mine.error, mine.error or "it started"
    assert mine.tokens == []
    assert any(line in mine.error for line in mine.log)  # in a line of its own, ahead of the tracebacks
    assert bool(stock.tokens) == (what not in REFUSED_BY_VLLM), stock.error or "stock vLLM started and answered"


EXTRA = "model_loader_extra_config"
ONLINE = {"linear": {"weight": "fp8_per_channel_static"}}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "an unknown key": ({EXTRA: {"shceme": "fp8_block"}}, "unknown key 'shceme'; known: scheme, format, ignore"),
    "a key of vLLM's loader": ({EXTRA: {"num_threads": 4}}, "unknown key 'num_threads'"),
    "an unknown scheme": ({EXTRA: {"scheme": "int4"}}, "unknown scheme 'int4'"),
    "fp8_tensor": ({EXTRA: {"scheme": "fp8_tensor"}}, "Use fp8_channel or fp8_block"),
    "mxfp8": ({EXTRA: {"scheme": "mxfp8"}}, "Use fp8_channel or fp8_block"),
    "a pattern without a match": ({EXTRA: {"ignore": ["model.layer.0"]}}, "'model.layer.0' matches no tensor"),
    "a tiny budget": ({EXTRA: {"staging_bytes": 1000}}, "staging_bytes is 1,000; at least"),
    "two schemes": (
        {EXTRA: {"scheme": "fp8_channel"}, "quantization": "octavo_fp8_block"},
        "contradict each other",
    ),
    "vLLM's own quantization": ({"quantization": "fp8"}, "leave --load-format out"),
    "vLLM's online quantization": ({"quantization_config": ONLINE}, "--quantization-config is for vLLM's own"),
    "vLLM's online quantization beside octavo's": (
        {"quantization_config": ONLINE, "quantization": "octavo_fp8_channel"},
        "--quantization-config is for vLLM's own",
    ),
    "octavo's options without octavo": (
        {"load_format": "auto", EXTRA: {"scheme": "fp8_block"}},
        "is for --load-format octavo, not auto",
    ),
    "another loader": (
        {"load_format": "runai_streamer", "quantization": "octavo_fp8_channel"},
        "use --load-format octavo",
    ),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    folder = make("llama", tmp_path_factory.mktemp("refused") / "llama")
    jobs = [Job(folder, {"load_format": "octavo", **options}) for options, _ in REFUSED.values()]
    return dict(zip(REFUSED, run(*jobs, timeout=600), strict=True))


@pytest.mark.parametrize("what", REFUSED)
def test_an_option_that_cant_be_honoured_is_an_error(what: str, refusals: dict[str, Answer]) -> None:
    assert REFUSED[what][1] in refusals[what].error, refusals[what].error or "it started"
    assert refusals[what].tokens == []


def test_what_is_quantized_already_is_not_quantized_again(tmp_path: Path) -> None:
    folder = convert(make("llama", tmp_path / "llama"), "fp8_channel")
    said = make("llama", tmp_path / "said")  # declared, and not so
    config = json.loads((said / "config.json").read_text())
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (said / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    loader, flag = run(octavo_job(said), Job(folder, {"quantization": "octavo_fp8_channel"}))
    assert "is served quantized already" in loader.error
    assert "the checkpoint is already quantized (compressed-tensors" in flag.error


def test_strict_refuses_what_the_loader_cant_take(tmp_path: Path) -> None:
    folder = make("llama4", tmp_path / "llama4")
    extra = {"load_format": "octavo", EXTRA: {"strict": True}}
    (answer,) = run(Job(folder, extra))
    assert re.search(r"self_attn\.[kq]_proj\.weight can't become FP8", answer.error)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (answer,) = run(octavo_job(folder))
    assert "pytorch_model.bin is a pickle" in answer.error
