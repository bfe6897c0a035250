"""Checkpoints as they lie about, served by vLLM through octavo: it makes the same of them as every other way does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.folders import edit_tensors, split_shards
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import Answer, octavo_job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def wrapped(prefix: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / MODEL, {"format": "pt"})

    return change


def stale(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"old": "model-00001-of-00009.safetensors"}}))


def leftover(folder: Path) -> None:
    split_shards(folder, folder, lambda name: "mlp" in name, 2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["mtp.fc.weight"] = min(index["weight_map"].values())
    (folder / INDEX).write_text(json.dumps(index))


def two(folder: Path) -> None:
    shutil.copy(folder / MODEL, folder / "kept")
    split_shards(folder, folder, lambda name: "mlp" in name, 2)
    (folder / "kept").rename(folder / MODEL)


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / MODEL).rename(folder / "adapter_model.safetensors")


def packed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows, columns = tensors.pop("model.layers.0.mlp.up_proj.weight").shape
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors["model.layers.0.mlp.up_proj.scales"] = torch.ones(1, rows)

    edit_tensors(folder, change)


#: name -> (what is done to a sound folder, a line of the log)
READ: dict[str, tuple[Callable[[Path], object], str]] = {
    "torch.compile": (wrapped("_orig_mod."), "'_orig_mod.', of a wrapper, left out of the names"),
    "DistributedDataParallel": (wrapped("module."), "'module.', of a wrapper, left out of the names"),
    "a stale index": (stale, f"{INDEX} is not complete, and not read"),
    "an index with a leftover": (leftover, "names tensors that no shard holds: mtp.fc.weight"),
}
#: name -> (what is done, what the error says)
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "two checkpoints": (two, f"holds two checkpoints, {MODEL} and {INDEX}"),
    "an adapter": (adapter, "an adapter of peft, not a model"),
    "packed integers": (packed, "already quantized (packed weights, though its config.json does not say so"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    root = tmp_path_factory.mktemp("wild")
    sound = make("llama", root / "sound")
    jobs = [octavo_job(sound)]
    for number, (change, _) in enumerate([*READ.values(), *REFUSED.values()]):
        folder = root / f"wild-{number}"
        shutil.copytree(sound, folder)
        change(folder)
        jobs.append(octavo_job(folder))
    return dict(zip(["sound", *READ, *REFUSED], run(*jobs, timeout=850), strict=True))


@pytest.mark.parametrize("case", READ)
def test_vllm_serves_the_same_of_it(case: str, answers: dict[str, Answer]) -> None:
    assert answers[case].parameters == answers["sound"].parameters, answers[case].error
    assert any(READ[case][1] in line for line in answers[case].log), answers[case].log


@pytest.mark.parametrize("case", REFUSED)
def test_vllm_is_told_what_it_is(case: str, answers: dict[str, Answer]) -> None:
    assert REFUSED[case][1] in answers[case].error
