"""Spoiled checkpoints: octavo says what is wrong, by name, and SGLang does not start.

Each is also given to stock SGLang in bf16. What that does is written down here, so that a version that does better is
noticed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.sglang_checkpoints import convert, make
from helpers.sglang_loading import Answer, Job, load, load_ranks, octavo_job
from helpers.spoiling import MLP, drop, half_twice, lose_shard, poison, rename, replace, truncate

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]

#: name -> (architecture, spoiler, what octavo names, whether stock SGLang 0.5.15 loads it all the same)
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
        "model.layers.0.mlp.experts.w2_weight [4, 128, 128]: only",
        True,
    ),
    "no norm": (
        "llama",
        drop("model.layers.0.input_layernorm.weight"),
        "model.layers.0.input_layernorm.weight [128]: comes from no tensor",
        True,
    ),
    "half of what is joined": (
        "deepseek_v3",
        drop("model.layers.0.self_attn.q_a_proj.weight"),
        "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight",
        True,
    ),
    "a misspelt name": (
        "llama",
        rename("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_porj.weight"),
        "model.layers.0.self_attn.qkv_proj.weight",
        True,
    ),
    "a matrix of another size": (
        "llama",
        replace("model.layers.0.self_attn.k_proj.weight", lambda t: t[:, :64]),
        "model.layers.0.self_attn.k_proj.weight",
        False,
    ),
    "a matrix of too few rows": (  # which SGLang fills up with zeros on a CPU
        "llama",
        replace(f"{MLP}gate_proj.weight", lambda t: t[:200]),
        f"{MLP}gate_proj.weight has the shape [200, 128], where model.layers.0.mlp.gate_proj.weight has [256, 128]",
        True,
    ),
    "not a number": (
        "llama",
        replace(f"{MLP}down_proj.weight", poison),
        f"tensor '{MLP}down_proj.weight' holds nan",
        True,
    ),
    "half a download": ("llama", truncate, "model.safetensors: header declares", False),
    "a shard that is missing": ("llama", lose_shard, "model-00002-of-00002.safetensors", True),
    "integers": (
        "llama",
        replace(f"{MLP}down_proj.weight", lambda t: t.to(torch.int8)),
        f"{MLP}down_proj.weight goes there, which is I8",
        True,
    ),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Of octavo and of stock SGLang."""
    root = tmp_path_factory.mktemp("spoiled")
    whole = {name: make(name, root / name) for name in {spoiled[0] for spoiled in SPOILED.values()}}
    jobs = []
    for number, (name, spoil, _, _) in enumerate(SPOILED.values()):
        folder = root / f"spoiled-{number}"
        shutil.copytree(whole[name], folder)
        spoil(folder)
        jobs += [octavo_job(folder), Job(folder)]
    found = load(*jobs, timeout=550)
    return dict(zip(SPOILED, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("what", SPOILED)
def test_octavo_stops_a_spoiled_checkpoint_and_names_it(what: str, answers: dict[str, tuple[Answer, Answer]]) -> None:
    mine, stock = answers[what]
    _, _, named, loads = SPOILED[what]
    assert named in mine.error, mine.error or "it was loaded"
    assert not mine.served
    assert bool(stock.served) == loads, stock.error or "stock SGLang loaded it"


def test_both_ranks_stop_where_one_finds_what_is_wrong(tmp_path: Path) -> None:
    """With experts of their own, one rank misses a matrix that the other one has no use for."""
    source = make("mixtral wide", tmp_path / "bf16")
    drop("model.layers.0.block_sparse_moe.experts.3.w2.weight")(source)
    ((first, second),) = load_ranks(2, octavo_job(source, ep_size=2))
    assert "model.layers.0.block_sparse_moe.experts.w2_weight" in second.error
    assert first.error or first.served


def test_a_checkpoint_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    (mine,) = load(octavo_job(convert(source, "fp8_channel")))
    assert "is quantized already" in mine.error
