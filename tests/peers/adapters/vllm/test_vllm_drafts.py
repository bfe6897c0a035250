"""Drafts beside a target: they stay as they are unless octavo's quantization is named for them, and equal stock vLLM's.

Options are the target's; what does not fit the draft does not concern it.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from helpers.folders import edit_tensors, tensors_of
from helpers.models import random_model
from helpers.vllm_checkpoints import CONFIGS, convert, make
from helpers.vllm_engine import Answer, Job, run

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

TARGET_ONLY = "model.layers.1.*"
EXTRA = {"model_loader_extra_config": {"ignore": [TARGET_ONLY]}}
OCTAVO = {"load_format": "octavo"}
FLAG = {"quantization": "octavo_fp8_channel"}


def make_draft(folder: Path) -> Path:
    """Of one layer, where the target has two."""
    name, config = CONFIGS["llama"]
    random_model(name, {**config, "num_hidden_layers": 1}, seed=1).save_pretrained(folder)
    return folder


def make_head(draft: Path, folder: Path) -> Path:
    """An EAGLE head: no embedding and no head of its own, and a layer that joins two states."""
    shutil.copytree(draft, folder)

    def change(tensors: dict[str, Any]) -> None:
        width = tensors["model.norm.weight"].numel()
        layers = {name: tensor for name, tensor in tensors.items() if ".layers." in name and "input_layer" not in name}
        tensors.clear()
        tensors.update({name.removeprefix("model."): tensor for name, tensor in layers.items()})
        tensors["fc.weight"] = torch.full((width, 2 * width), 0.01, dtype=torch.bfloat16)

    edit_tensors(folder, change)
    return folder


def beside(target: Path, draft: Path, options: dict[str, Any], method: str = "draft_model", **more: Any) -> Job:
    speculative = {"method": method, "model": str(draft), "num_speculative_tokens": 2, **more}
    return Job(target, {"speculative_config": speculative, **options}, [["draft"]])


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    root = tmp_path_factory.mktemp("drafts")
    target, draft = make("llama", root / "target"), make_draft(root / "draft")
    head = make_head(draft, root / "head")
    converted, small = convert(target, "fp8_channel"), convert(draft, "fp8_channel")
    in_part = root / "in part"
    octavo.convert(target, in_part, octavo.Recipe("fp8_channel", ignore=[TARGET_ONLY]), prove=False)
    broken = root / "broken"
    shutil.copytree(draft, broken)
    edit_tensors(broken, lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight" not in tensors_of(broken)
    jobs = {
        "stock": beside(converted, draft, {}),
        "by load format": beside(target, draft, OCTAVO),
        "by both": beside(target, draft, {**OCTAVO, **FLAG}),
        "stock, in part": beside(in_part, draft, {}),
        "by flag, in part": beside(target, draft, {**FLAG, **EXTRA}),
        "stock, both in FP8": beside(in_part, small, {}),
        "both in FP8": beside(target, draft, {**OCTAVO, **EXTRA}, **FLAG),
        "stock eagle": beside(converted, head, {}, "eagle"),
        "eagle": beside(target, head, FLAG, "eagle"),
        "eagle in FP8": beside(target, head, OCTAVO, "eagle", **FLAG),
        "broken": beside(target, broken, OCTAVO, **FLAG),
        # last: no engine starts in the same process after numba, which it imports
        "ngram": Job(target, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}, **OCTAVO}),
    }
    return dict(zip(jobs, run(*jobs.values(), timeout=850), strict=True))


@pytest.mark.parametrize(
    ("mine", "stock"),
    [
        ("by load format", "stock"),
        ("by both", "stock"),
        ("by flag, in part", "stock, in part"),
        ("both in FP8", "stock, both in FP8"),
        ("eagle", "stock eagle"),
    ],
)
def test_target_and_draft_equal_those_of_stock_vllm(mine: str, stock: str, answers: dict[str, Answer]) -> None:
    found, expected = answers[mine], answers[stock]
    assert not expected.error, expected.output[-3000:]
    assert not found.error, found.output[-3000:]
    assert found.log != expected.log == []
    compared = dataclasses.replace(found, log=[], output="")
    assert compared == dataclasses.replace(expected, output="")


def test_a_head_becomes_fp8_where_it_is_asked_for(answers: dict[str, Answer]) -> None:
    found = answers["eagle in FP8"]
    assert not found.error, found.output[-3000:]
    (draft,) = found.results
    quantized = sorted(name.rpartition(".layers.")[2] for name, digest in draft.items() if "float8" in digest)
    assert [name.partition(".")[2] for name in quantized if name[0].isdigit()] == [
        "mlp.down_proj.weight",
        "mlp.gate_up_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.qkv_proj.weight",
    ]
    # the head only proposes
    assert found.tokens == answers["eagle"].tokens == answers["ngram"].tokens


def test_an_error_says_which_model_it_is_about(answers: dict[str, Answer]) -> None:
    assert "CoverageError: the draft: /" in answers["broken"].error
    assert "model.norm.weight [128]: comes from no tensor" in answers["broken"].error
