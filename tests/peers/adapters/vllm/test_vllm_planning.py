"""What is planned for vLLM without weights is what loading does: bytes on each rank, or the same error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.coded_models import by_modelopt, in_blocks
from helpers.vllm_checkpoints import make
from helpers.vllm_engine import ENVIRONMENT
from octavo.adapters.engine.forecast import Forecast
from octavo.adapters.vllm.planning import plan_for_vllm
from octavo.choices import DEFAULT_STAGING_BYTES
from octavo.errors import CoverageError, RecipeError

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("vllm_loads"),
]

#: forecasts of all jobs; those that are to be loaded are, rank by rank, and what was read, placed and held is told
SCRIPT = """
import json, sys
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from helpers.vllm_stand_ins import stand_in
from octavo.adapters.engine import loading
from octavo.adapters.vllm import forecasting, loader, versions

tallies, held, before = [], [], set()

class Tally(loading.Tally):
    def __init__(self):
        super().__init__()
        tallies.append(self)

def storages(modules):
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t) and t.ndim}

def prepare(model, *_):
    held.append(sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values()))
    before.clear(), before.update(storages(model.modules()))

loading.Tally, loader.reload.prepare = Tally, prepare
stand_in()
for model, extra, options, loads in json.load(sys.stdin):
    found = forecasting.answer(model, extra, options)
    tallies.clear(), held.clear()
    derived = []
    for rank in range(len(found.get("ranks", ())) if loads else 0):
        arguments = EngineArgs(model=model, load_format="octavo", model_loader_extra_config=extra, enforce_eager=True,
            skip_tokenizer_init=True, distributed_executor_backend="mp", **options)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), versions.as_rank(rank, config):
            loaded = loader.OctavoLoader(config.load_config).load_model(config, config.model_config)
            made = storages(m for m in loaded.modules() if isinstance(m, AttentionLayerBase))
            derived.append(sum(nbytes for key, nbytes in made.items() if key not in before))
    figures = [[t.read_bytes, t.placed_bytes, *h] for t, *h in zip(tallies, held, derived, strict=True)]
    print("FOUND", json.dumps([found, figures]), flush=True)
"""
TWO = {"tensor_parallel_size": 2}
#: architecture, scheme, options
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one rank": ("opt", "fp8_channel", {}),
    "two ranks": ("llama wide", "fp8_channel", TWO),
    "two ranks of experts": ("qwen2_moe wide", "fp8_block", TWO),
    "experts apart": ("qwen2_moe wide", "fp8_channel", {**TWO, "enable_expert_parallel": True}),
    "stacks of experts": ("granitemoe wide", "fp8_block", TWO),
    "latent attention": ("deepseek_v3", "fp8_channel", {}),
    "layers apart": ("llama wide", "fp8_block", {"pipeline_parallel_size": 2}),
}


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _unknown_to_vllm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))


def _quantized_already(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def _without_data(folder: Path) -> None:
    """Headers, in a file that is as long as it says, without a block of data on the disk."""
    path = folder / "model.safetensors"
    size, header = path.stat().st_size, 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, header)
    os.truncate(path, size)


#: what is wrong with a checkpoint or the options -> the change, the options, the error and what it says
WRONG: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "a tensor is missing": (_without_a_tensor, {}, "CoverageError", "gate_up_proj.*up_proj|mlp.gate_proj.weight goes"),
    "no such model": (_unknown_to_vllm, {}, "RecipeError", "vLLM can't make this model: .*NobodyForCausalLM"),
    "FP8 already": (_quantized_already, {}, "", "quantized already"),
    "heads": (
        lambda _: None,
        {"tensor_parallel_size": 3},
        "RecipeError",
        "vLLM can't make this model: .*tensor parallel",
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Case -> forecast (or error), and of each rank that was loaded, bytes read, placed and held."""
    root = tmp_path_factory.mktemp("planning")
    sources = {name: make(name, root / name) for name in {case[0] for case in CASES.values()}}
    jobs = [[str(sources[name]), {"scheme": scheme}, options, True] for name, scheme, options in CASES.values()]
    for number, (change, options, *_) in enumerate(WRONG.values()):
        folder = make("llama", root / f"wrong-{number}")
        change(folder)
        jobs.append([str(folder), {}, options, False])
    hollow = make("llama wide", root / "hollow")
    _without_data(hollow)
    jobs.append([str(hollow), {}, TWO, False])
    jobs.append([str(make("smollm2", root / "smollm2")), {"scheme": "fp8_block"}, {}, False])
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parents[3],
        timeout=500,
    )
    answers = [json.loads(line[6:]) for line in ended.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(answers) == len(jobs), ended.stderr[-3000:]
    return dict(zip([*CASES, *WRONG, "hollow", "smollm2"], answers, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_each_rank_reads_and_holds_what_was_planned(case: str, found: dict[str, Any]) -> None:
    fields, loaded = found[case]
    _, scheme, options = CASES[case]
    assert "error" not in fields, fields["text"]
    ranks = Forecast.from_dict(fields).ranks
    assert len(ranks) == len(loaded) == max([1, *(value for value in options.values() if value is not True)])
    for rank, (read, placed, held, derived) in zip(ranks, loaded, strict=True):
        assert rank.read_bytes == read
        assert sum(weight.nbytes for weight in rank.weights) == placed
        assert sum(rank.derived.values()) == derived
        assert (derived > 0) == (case == "latent attention")
        assert rank.final_bytes == held + derived == placed + rank.beside_bytes + derived
        assert held < rank.peak_bytes <= held + DEFAULT_STAGING_BYTES
        assert {weight.to for weight in rank.weights if weight.quantized} == {scheme}
        assert not any(weight.computed for weight in rank.weights)
    assert sum(rank.beside_bytes for rank in ranks) >= 60 * 128 * 2  # vLLM has 320 rows for a vocabulary of 260


@pytest.mark.parametrize("case", WRONG)
def test_what_loading_would_find_wrong_is_found(case: str, found: dict[str, Any]) -> None:
    fields, _ = found[case]
    *_, error, says = WRONG[case]
    assert fields["error"] == error or not error
    assert re.search(says, fields["text"])


def test_a_checkpoint_needs_no_data(found: dict[str, Any]) -> None:
    (hollow, _), (full, _) = found["hollow"], found["two ranks"]
    assert hollow["ranks"] == full["ranks"]


def test_a_layer_that_does_not_fit_is_told_with_the_reason(found: dict[str, Any]) -> None:
    """vLLM has no block kernel for SmolLM2's sides."""
    (rank,) = Forecast.from_dict(found["smollm2"][0]).ranks
    stays = {weight.name: weight.why for weight in rank.weights if not weight.quantized}
    why = next(why for name, why in stays.items() if "self_attn" in name)
    assert why != "linear"
    assert rank.grouped(True)  # others become FP8


def test_the_command_says_what_does_not_fit(tmp_path: Path) -> None:
    folder = make("llama wide", tmp_path / "bf16")
    command = [sys.executable, "-m", "octavo", "plan", str(folder), "--engine", "vllm", "-tp", "2"]
    ended = subprocess.run([*command, "--device-memory", "1MiB", "--json"], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    told = json.loads(ended.stdout)
    assert told["fits"] is False
    assert told["engine"].startswith("vLLM ")
    for rank in told["ranks"]:
        assert rank["quantized"]["fp8_channel"]["tensors"] == 14
        assert rank["kept"]["output head, kept by default"]["tensors"] == 1
        assert rank["peak_bytes"] > rank["final_bytes"] > rank["quantized"]["fp8_channel"]["bytes"]


def test_an_error_of_that_process_is_raised_here(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "bf16")
    _without_a_tensor(folder)
    with pytest.raises(CoverageError, match="gate_up_proj"):
        plan_for_vllm(folder, "fp8_channel", staging_bytes=DEFAULT_STAGING_BYTES)


def test_a_source_in_blocks_stays_so_where_no_scheme_is_named(tmp_path: Path) -> None:
    plain = make("llama", tmp_path / "bf16")
    config = {**json.loads((plain / "config.json").read_text()), "quantization_config": FINE_GRAINED}
    source = write_checkpoint(tmp_path / "fp8", fine_grained(load_file(plain / "model.safetensors")), config=config)
    found = plan_for_vllm(source, "auto", staging_bytes=DEFAULT_STAGING_BYTES)
    assert found.scheme == "fp8_block"
    assert set(found.ranks[0].grouped(True)) == {"fp8_block"}
    assert "note: no scheme is named, and the source is" in found.table()


def test_what_is_rounded_a_second_time_is_said_of_all_ranks_at_once(tmp_path: Path) -> None:
    plain = make("llama", tmp_path / "bf16")
    source = in_blocks(plain, tmp_path / "blocks")
    found = plan_for_vllm(source, "fp8_channel", staging_bytes=DEFAULT_STAGING_BYTES, tensor_parallel=2)
    said = "14 tensors are FP8 in blocks of 128x128 already, and fp8_channel rounds them a second time, where fp8_block"
    assert [note.startswith(said) for note in found.notes] == [True]
    source = by_modelopt(plain, tmp_path / "matrices")  # vLLM has no fp8_tensor
    found = plan_for_vllm(source, "auto", staging_bytes=DEFAULT_STAGING_BYTES)
    assert any("fp8_channel rounds them a second time, as any would" in note for note in found.notes)


def test_a_scheme_that_vllm_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the scheme mxfp8 is not offered in vLLM"):
        plan_for_vllm(tmp_path, "mxfp8", staging_bytes=DEFAULT_STAGING_BYTES)
