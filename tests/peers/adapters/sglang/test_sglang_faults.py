"""Spoiled checkpoints: octavo says what is wrong, by name, and SGLang does not start.

Each is also given to stock SGLang in bf16. What that does is written down here, so that a version that does better is
noticed.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch

from helpers import spoiling
from helpers.sglang_checkpoints import make
from helpers.sglang_loading import Answer, Job, load, load_ranks, octavo_job
from helpers.spoiling import MLP, drop, replace, spoil

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]

SPOILED = {
    **spoiling.SPOILED,
    "an expert without one matrix": (
        "qwen2_moe",
        spoiling.EXPERT,
        "model.layers.0.mlp.experts.w2_weight [4, 128, 128]: only",
    ),
    "half of what is joined": (
        "deepseek_v3",
        drop("model.layers.0.self_attn.q_a_proj.weight"),
        "model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight",
    ),
    "a misspelt name": ("llama", spoiling.MISSPELT, "model.layers.0.self_attn.qkv_proj.weight"),
    "a matrix of another size": (
        "llama",
        replace("model.layers.0.self_attn.k_proj.weight", lambda t: t[:, :64]),
        "model.layers.0.self_attn.k_proj.weight",
    ),
    "a matrix of too few rows": (  # which SGLang fills up with zeros on a CPU
        "llama",
        replace(f"{MLP}gate_proj.weight", lambda t: t[:200]),
        f"{MLP}gate_proj.weight has the shape [200, 128], where model.layers.0.mlp.gate_proj.weight has [256, 128]",
    ),
    "a matrix of too many rows": (  # of which SGLang takes the first
        "llama",
        replace(f"{MLP}gate_proj.weight", lambda t: torch.cat([t, t[:64]])),
        f"{MLP}gate_proj.weight has the shape [320, 128], where model.layers.0.mlp.gate_proj.weight has [256, 128]",
    ),
}
#: all others, stock SGLang loads
REFUSED_BY_SGLANG = {"a matrix of another size", "half a download"}
#: which SGLang 0.5.15 does not refuse yet
REFUSED_LATER = {"a shard that is missing"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Answer, Answer]]:
    """Of octavo and of stock SGLang."""
    folders = spoil(SPOILED, tmp_path_factory.mktemp("spoiled"), make)
    found = load(*(job for folder in folders for job in (octavo_job(folder), Job(folder))), timeout=550)
    return dict(zip(SPOILED, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("what", SPOILED)
def test_octavo_stops_a_spoiled_checkpoint_and_names_it(what: str, answers: dict[str, tuple[Answer, Answer]]) -> None:
    mine, stock = answers[what]
    assert SPOILED[what][2] in mine.error, mine.error or "it was loaded"
    assert not mine.served
    old = importlib.metadata.version("sglang").startswith("0.5.15")
    refused = REFUSED_BY_SGLANG if old else REFUSED_BY_SGLANG | REFUSED_LATER
    assert bool(stock.served) == (what not in refused), stock.error or "stock SGLang loaded it"


def test_both_ranks_stop_where_one_finds_what_is_wrong(tmp_path: Path) -> None:
    """With experts of their own, one rank misses a matrix that the other one has no use for."""
    source = make("mixtral wide", tmp_path / "bf16")
    drop("model.layers.0.block_sparse_moe.experts.3.w2.weight")(source)
    ((first, second),) = load_ranks(2, octavo_job(source, ep_size=2))
    assert "model.layers.0.block_sparse_moe.experts.w2_weight" in second.error
    assert first.error or first.served


def test_a_checkpoint_that_octavo_cant_decode_is_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    (mine,) = load(octavo_job(source))
    assert "is quantized already (gptq" in mine.error
