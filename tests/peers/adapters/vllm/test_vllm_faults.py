"""Spoiled checkpoints and contradictory options: octavo says what is wrong, by name, before vLLM serves anything.

Each spoiled checkpoint is also given to stock vLLM with its online quantization. What that does is written down here,
so that a version that does better is noticed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.spoiling import MLP, drop, half_twice, lose_shard, poison, rename, replace, truncate
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

#: name -> (architecture, spoiler, what octavo names, whether stock vLLM 0.32 starts and answers all the same)
SPOILED: dict[str, tuple[str, Callable[[Path], object], str, bool]] = {
    "a layer with no weights": (
        "llama",
        drop(*(f"{MLP}{part}_proj.weight" for part in ("gate", "up", "down"))),
        "model.layers.1.mlp.down_proj.weight [128, 256]: comes from no tensor of the checkpoint",
        True,
    ),
    "half a layer": ("llama", drop(f"{MLP}up_proj.weight"), f"only {MLP}gate_proj.weight goes there; ", True),
    "one half twice": ("llama", half_twice, f"tensor '{MLP}gate_proj.weight' is also in model-00001-of", True),
    "an expert without one matrix": (
        "qwen2_moe",
        drop("model.layers.0.mlp.experts.2.down_proj.weight"),
        "model.layers.0.mlp.experts.routed_experts.w2_weight [4, 128, 128]: only",
        True,
    ),
    "no norm": (
        "llama",
        drop("model.layers.0.input_layernorm.weight"),
        "model.layers.0.input_layernorm.weight [128]: comes from no tensor",
        True,
    ),
    "a misspelt name": (
        "llama",
        rename("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_porj.weight"),
        "does not take the tensor 'model.layers.0.self_attn.q_porj.weight'",
        False,
    ),
    "a matrix of another size": (
        "llama",
        replace("model.layers.0.self_attn.k_proj.weight", lambda t: t[:64]),
        "model.layers.0.self_attn.k_proj.weight",
        False,
    ),
    "not a number": (
        "llama",
        replace(f"{MLP}down_proj.weight", poison),
        f"tensor '{MLP}down_proj.weight' holds nan",
        True,
    ),
    "half a download": ("llama", truncate, "model.safetensors: header declares", False),
    "a shard that is missing": ("llama", lose_shard, "model-00002-of-00002.safetensors", False),
    "integers": (
        "llama",
        replace(f"{MLP}down_proj.weight", lambda t: t.to(torch.int8)),
        f"{MLP}down_proj.weight goes there, which is I8",
        True,
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Of octavo and of stock vLLM."""
    root = tmp_path_factory.mktemp("spoiled")
    whole = {name: make(name, root / name) for name in {spoiled[0] for spoiled in SPOILED.values()}}
    jobs = []
    for number, (name, spoil, _, _) in enumerate(SPOILED.values()):
        folder = root / f"spoiled-{number}"
        shutil.copytree(whole[name], folder)
        spoil(folder)
        jobs += [octavo_job(folder), Job(folder, {"quantization": "fp8_per_block"})]
    found = run(*jobs, timeout=850)
    return dict(zip(SPOILED, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("what", SPOILED)
def test_octavo_stops_a_spoiled_checkpoint_and_names_it(what: str, answers: dict[str, tuple[Answer, Answer]]) -> None:
    mine, stock = answers[what]
    _, _, named, starts = SPOILED[what]
    assert named in mine.error, mine.error or "it started"
    assert mine.tokens == []
    assert any(line in mine.error for line in mine.log)  # in a line of its own, ahead of the tracebacks
    assert bool(stock.tokens) == starts, stock.error or "stock vLLM started and answered"


EXTRA = "model_loader_extra_config"
ONLINE = {"linear": {"weight": "fp8_per_channel_static"}}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "an unknown key": ({EXTRA: {"shceme": "fp8_block"}}, "unknown key 'shceme'; known: scheme, ignore"),
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
    loader, flag = run(octavo_job(folder), Job(folder, {"quantization": "octavo_fp8_channel"}))
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
