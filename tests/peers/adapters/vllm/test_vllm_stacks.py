"""Experts that are stacks in the file: loaded by octavo, they are what stock vLLM has of the converted checkpoint."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from helpers import vllm_published
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import Answer, Job, octavo_job
from helpers.vllm_loading import load
from helpers.vllm_reading import convert_for
from octavo.adapters.vllm.reader import VllmReader

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_loads")]

SCHEMES = ["fp8_channel", "fp8_block"]
PUBLISHED = {"llama4 published": vllm_published.llama4, "qwen3_vl_moe published": vllm_published.qwen3_vl_moe}


@pytest.fixture(scope="module")
def reader() -> VllmReader:
    return VllmReader()


def stacked(name: str, folder: Path, seed: int = 0) -> Path:
    if name in PUBLISHED:
        pytest.importorskip("torchvision")  # without which vLLM has no vision-language models
    source = PUBLISHED[name](folder, seed) if name in PUBLISHED else make(name, folder, seed)
    assert any(tensor.ndim == 3 and tensor.shape[1] > 1 for tensor in tensors_of(source).values())
    return source


def experts(answer: Answer) -> dict[str, str]:
    assert not answer.error, answer.output[-4000:]
    return {name: digest for name, digest in answer.parameters[0].items() if ".w13_" in name or ".w2_" in name}


@pytest.mark.parametrize("name", ["granitemoe", "llama4", *PUBLISHED])
def test_parameters_are_those_of_the_converted_checkpoint(name: str, reader: VllmReader, tmp_path: Path) -> None:
    source = stacked(name, tmp_path / "bf16")
    converted = []
    for scheme in SCHEMES:
        out, _ = convert_for(reader, source, scheme)
        converted.append(Job(out.rename(tmp_path / scheme)))
    answers = load(*(octavo_job(source, scheme) for scheme in SCHEMES), *converted, timeout=500)
    for mine, stock in zip(answers[:2], answers[2:], strict=True):
        found = experts(mine)
        assert found
        assert all("float8" in digest for name, digest in found.items() if not name.endswith("_scale"))
        assert mine.parameters == stock.parameters


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_vl_moe published"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacks_that_come_in_an_update_are_cut_as_they_were(name: str, scheme: str, tmp_path: Path) -> None:
    old, new = stacked(name, tmp_path / "old"), stacked(name, tmp_path / "new", seed=1)
    update = ["update", str(new), [list(tensors_of(new))]]
    mine, fresh = load(octavo_job(old, scheme, [update, ["reload", str(old)]]), octavo_job(new, scheme), timeout=500)
    assert experts(mine) != experts(fresh)
    assert mine.results == [[fresh.parameters[0], True, []], [mine.parameters[0], True]]


def test_a_stack_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = stacked("granitemoe", tmp_path / "bf16")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    name = "model.layers.0.block_sparse_moe.input_linear.weight"
    vllm_published.edit_tensors(other, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2)}))
    (mine,) = load(octavo_job(source, steps=[["update", str(other), [[name]]]]))
    (after, in_place, errors) = mine.results[0]
    assert errors == [f"{name}: has the shape [4, 128, 512], was loaded with [4, 512, 128]"]
    assert (after, in_place) == (mine.parameters[0], True)


def test_experts_are_ignored_by_their_stacks_or_as_a_layer(tmp_path: Path) -> None:
    source = stacked("granitemoe", tmp_path / "bf16")
    patterns = [["*.experts.*"], ["*_linear.weight"], ["*.experts.0.*"]]
    layers, stacks, one = load(
        *(Job(source, {"load_format": "octavo", "model_loader_extra_config": {"ignore": given}}) for given in patterns),
        timeout=500,
    )
    found = experts(layers)
    assert found == experts(stacks)
    assert all("bfloat16" in digest for digest in found.values())
    assert re.search(
        r"'\*\.experts\.0\.\*' matches .*\.0\.gate_proj\.weight, one expert's, of which all in a", one.error
    )
    assert "ignore model.layers.0.block_sparse_moe.experts" in one.error
