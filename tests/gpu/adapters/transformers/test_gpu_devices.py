"""Models spread over two GPUs, both ways into transformers: the bytes and answers of one, each within its own bound."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from helpers import same_bytes
from helpers.device_maps import ROUTES, load
from octavo.choices import DEFAULT_STAGING_BYTES
from octavo.errors import WeightError

sys.path.insert(0, str(Path(__file__).parents[3] / "integration"))
sys.path.insert(0, str(Path(__file__).parent))
from _models import make_checkpoint, prompt
from test_gpu_memory import LLAMA, make_source

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")]

GPUS = ("cuda:0", "cuda:1")
LAYERS = 4
#: the parts of two GPUs: embedding and half of the layers, the rest
APART = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    **{f"model.layers.{number}": number * 2 // LAYERS for number in range(LAYERS)},
    "model.norm": 1,
    "lm_head": 1,
}
#: of a model whose head is its embedding
TIED = {**APART, "lm_head": 0}


by_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def small(name: str, folder: Path) -> Path:
    return make_checkpoint(name, folder / name, num_hidden_layers=LAYERS)


def devices_of(model: Any) -> set[str]:
    return {str(parameter.device) for parameter in model.parameters()}


def assert_answers_alike(model: Any, alone: Any) -> None:
    """The bytes, logits and words of a model that is on one GPU."""
    mine, theirs = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, alone))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert same_bytes(tensor.detach().cpu(), theirs[name].detach().cpu()), name
    ids = prompt().to("cuda:0")
    with torch.no_grad():
        for _ in range(2):  # kernels are launched another way from the second time on
            assert torch.equal(model(ids).logits.cpu(), alone(ids).logits.cpu())
    mine, theirs = (m.generate(ids[:, :5], max_new_tokens=12, do_sample=False).cpu() for m in (model, alone))
    assert torch.equal(mine, theirs)


# -- what is there ----------------------------------------------------------------------------------------------------


@by_route
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "mxfp8"])
def test_a_map_of_modules_gives_the_model_of_one_gpu(name: str, scheme: str, route: Any, tmp_path: Path) -> None:
    folder = small(name, tmp_path)
    model, alone = route(folder, APART, scheme), octavo.load(folder, scheme, "cuda:0")
    assert devices_of(model) == set(GPUS)
    for module, device in APART.items():
        found = {tensor.device.index for tensor in model.get_submodule(module).state_dict().values()}
        assert found <= {device}
    assert_answers_alike(model, alone)


@by_route
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v3"])
def test_an_automatic_map_gives_the_model_of_one_gpu(name: str, device_map: str, route: Any, tmp_path: Path) -> None:
    folder = small(name, tmp_path)
    alone = octavo.load(folder, device="cuda:0")
    room = alone.load_report.final_bytes * 3 // 4
    options = {"max_memory": {0: room, 1: 2 * room}} if device_map == "sequential" else {}
    model = route(folder, device_map, **options)
    assert devices_of(model) == set(GPUS)
    assert_answers_alike(model, alone)


@by_route
@pytest.mark.parametrize("device_map", ["auto", TIED], ids=["auto", "modules"])
def test_tied_weights_stay_one(device_map: Any, route: Any, tmp_path: Path) -> None:
    folder = small("gemma2", tmp_path)
    model = route(folder, device_map)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert devices_of(model) == set(GPUS)
    assert_answers_alike(model, octavo.load(folder, device="cuda:0"))


@by_route
def test_what_is_on_the_cpu_is_lent(route: Any, tmp_path: Path) -> None:
    folder = small("qwen2_moe", tmp_path)
    model = route(folder, {**APART, "model.layers.1": "cpu", "model.layers.3": "cpu"})
    alone = octavo.load(folder, device="cuda:0")
    assert devices_of(model) == {*GPUS, "meta"}
    assert any("are on the CPU, and copied" in note for note in model.load_report.notes)
    ids = prompt().to("cuda:0")
    with torch.no_grad():
        assert torch.equal(model(ids).logits.cpu(), alone(ids).logits.cpu())


def test_a_saved_model_is_spread_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = small("qwen2_moe", tmp_path)
    alone = octavo.load(folder, device="cuda:0")
    load(folder, APART).save_pretrained(tmp_path / "saved")
    for model in (
        load(tmp_path / "saved", "auto"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="auto"),
    ):
        assert devices_of(model) == set(GPUS)
        assert_answers_alike(model, alone)


@by_route
def test_an_update_reaches_both_gpus(route: Any, tmp_path: Path) -> None:
    folder = small("qwen2_moe", tmp_path)
    tensors = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    model, alone = route(folder, APART), octavo.load(folder, device="cuda:0")
    for updated in (model, alone):
        octavo.update(updated, tensors)
    assert_answers_alike(model, alone)


@by_route
def test_a_non_finite_weight_is_named_on_the_second_gpu(route: Any, tmp_path: Path) -> None:
    folder = small("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"'model.layers.3.mlp.up_proj.weight' holds nan \(at \[3, 5\]\)"):
        route(folder, APART)


# -- what it takes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2.0 GiB in bf16, 1.0 in FP8."""
    return make_source(tmp_path_factory.mktemp("source"), LLAMA, "cuda")


def settle() -> None:
    gc.collect()  # models of earlier tests
    for device in GPUS:
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@by_route
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
@pytest.mark.parametrize("device_map", ["auto", "halves"])
def test_each_gpu_takes_its_part_and_staging(device_map: str, scheme: str, route: Any, source: Path) -> None:
    """torch's allocator is given no more than that."""
    layers = LLAMA["num_hidden_layers"]
    halves = {
        **dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), 0),
        **{f"model.layers.{number}": number * 2 // layers for number in range(layers)},
        **dict.fromkeys(("model.norm", "lm_head"), 1),
    }
    asked: Any = halves if device_map == "halves" else device_map
    plan = octavo.plan(source, scheme, device_map=asked)
    assert set(plan.devices) == set(GPUS)
    assert min(plan.final_bytes(device) for device in GPUS) > 0.3 * plan.final_bytes()
    settle()
    allocated = {device: torch.cuda.memory_allocated(device) for device in GPUS}
    reserved = {device: torch.cuda.memory_reserved(device) for device in GPUS}
    bound = {device: int(1.02 * plan.final_bytes(device)) + DEFAULT_STAGING_BYTES for device in GPUS}
    try:
        for device in GPUS:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction((reserved[device] + bound[device]) / total, device)
        model = route(source, asked, scheme)
    finally:
        for device in GPUS:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    report = model.load_report
    assert set(report.devices) == set(GPUS)
    for device in GPUS:
        torch.cuda.synchronize(device)
        final = plan.final_bytes(device)
        assert final <= torch.cuda.memory_allocated(device) - allocated[device] <= 1.02 * final
        assert torch.cuda.max_memory_allocated(device) - allocated[device] <= bound[device]
        assert torch.cuda.max_memory_reserved(device) - reserved[device] <= bound[device]
        assert report.devices[device]["final_bytes"] == final
        assert final <= report.devices[device]["peak_bytes"] <= bound[device]
    assert report.read_bytes == report.source_bytes  # each byte once


@by_route
def test_lending_from_the_cpu_takes_no_more_of_the_gpu(route: Any, source: Path) -> None:
    half = LLAMA["num_hidden_layers"] // 2
    places = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.norm": 0,
        "lm_head": 0,
        **{f"model.layers.{number}": 0 if number < half else "cpu" for number in range(2 * half)},
    }
    plan = octavo.plan(source, device_map=places)
    settle()
    before = torch.cuda.memory_allocated("cuda:0")
    model = route(source, places)
    torch.cuda.synchronize("cuda:0")
    bound = int(1.02 * plan.final_bytes("cuda:0")) + DEFAULT_STAGING_BYTES
    assert torch.cuda.max_memory_allocated("cuda:0") - before <= bound
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(8, device="cuda:0")[None]).logits).all())
