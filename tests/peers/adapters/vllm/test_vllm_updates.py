"""Updates, without the engine: what trainers may send that is not what the checkpoint was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.folders import tensors_of
from helpers.models import random_model
from helpers.vllm_checkpoints import CONFIGS
from helpers.vllm_engine import octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]


def two(name: str, folder: Path, **sides: Any) -> tuple[Path, Path]:
    """Two checkpoints of one model, old and new."""
    kind, config = CONFIGS[name]
    for number, which in enumerate(("old", "new")):
        random_model(kind, {**config, **sides}, seed=number).save_pretrained(folder / which)
    return folder / "old", folder / "new"


@pytest.mark.parametrize("intermediate", [128, 48], ids=["packed", "padded"])
def test_experts_that_stay_in_bf16_are_packed_again(intermediate: int, tmp_path: Path) -> None:
    """vLLM alone packs them for a CPU the first time only, and reads what came next as if it were packed."""
    old, new = two("qwen3_moe", tmp_path, moe_intermediate_size=intermediate)
    names = list(tensors_of(new))
    steps = [["update", str(new), [names]], ["reload", str(old)], ["update", str(new), [names[::2], names[1::2]]]]
    extra = {"ignore": ["*.mlp.experts.*"]}
    mine, fresh = load(
        octavo_job(old, steps=steps, model_loader_extra_config=extra), octavo_job(new, model_loader_extra_config=extra)
    )
    assert not mine.error, mine.error
    assert any(".experts." in name and "bfloat16" in digest for name, digest in fresh.parameters[0].items())
    assert mine.results == [
        [fresh.parameters[0], True, []],
        [mine.parameters[0], True],
        [fresh.parameters[0], True, []],
    ]
