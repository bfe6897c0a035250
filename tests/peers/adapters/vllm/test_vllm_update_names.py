"""Updates by the names that a trainer's wrappers make, which vLLM's loaders don't know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import octavo
from helpers import write_checkpoint
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import octavo_job
from helpers.vllm_loading import load

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]

WRAPPED: dict[str, Callable[[str], str]] = {
    "compile": lambda name: f"_orig_mod.{name}",
    "peft": lambda name: f"base_model.model.{name}".replace("o_proj.", "o_proj.base_layer."),
    "fsdp": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "ddp": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_wrapped_names_load_what_the_plain_ones_do(name: str, tmp_path: Path) -> None:
    old, new = make(name, tmp_path / "old"), make(name, tmp_path / "new", seed=1)
    tensors, config, steps = tensors_of(new), json.loads((new / "config.json").read_text()), []
    for wrapper, wrapped in WRAPPED.items():
        sent = {wrapped(name): tensor for name, tensor in tensors.items()}
        folder = write_checkpoint(tmp_path / wrapper, sent, config=config)
        steps.append(["update", str(folder), [list(sent)]])
    mine, fresh = load(octavo_job(old, steps=steps), octavo_job(new))
    assert not mine.error, mine.error
    assert mine.parameters != fresh.parameters
    assert mine.results == [[fresh.parameters[0], True, []]] * len(steps)


@pytest.mark.parametrize(
    ("name", "scheme"), [("llama", "fp8_channel"), ("qwen3_moe", "fp8_channel"), ("llama", "auto")]
)
def test_fp8_blocks_of_a_trainer_are_what_a_load_of_them_is(name: str, scheme: str, tmp_path: Path) -> None:
    """By names of the fp8 format: quantized anew, or, where the model was loaded from blocks, passing through."""
    old, new = make(name, tmp_path / "old"), make(name, tmp_path / "new", seed=1)
    blocks = [folder.with_name(f"{folder.name}-blocks") for folder in (old, new)]
    for folder, written in zip((old, new), blocks, strict=True):
        octavo.convert(folder, written, "fp8_block", format="fp8", prove=False)
    first = blocks[0] if scheme == "auto" else old
    names = list(tensors_of(blocks[1]))
    assert any(name.endswith("_scale_inv") for name in names)
    steps = [["update", str(blocks[1]), [order]] for order in (names, names[::-1])]
    steps.insert(1, ["reload", str(first)])
    mine, fresh = load(octavo_job(first, scheme, steps), octavo_job(blocks[1], scheme))
    for answer in (mine, fresh):
        assert not answer.error, answer.error
    assert mine.parameters != fresh.parameters
    updated = [fresh.parameters[0], True, []]
    assert mine.results == [updated, [mine.parameters[0], True], updated]
