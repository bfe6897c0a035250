"""What only a CUDA device can show: `make gpu`. The bytes are the CPU's, the peak is bounded, bad weights are named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from helpers import random_weights, same_bytes
from octavo.errors import WeightError
from octavo.numerics import schemes

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from _models import CONFIGS, make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SCHEMES = list(schemes.SCHEMES)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(300, 200), (3, 130, 257), (1, 40_000)])
def test_a_gpu_quantizes_to_the_bytes_of_a_cpu(scheme, dtype, shape):
    each = schemes.get(scheme).align
    weight = random_weights((*shape[:-1], shape[-1] // each * each), dtype, 0)
    for mine, theirs in zip(schemes.quantize(weight.cuda(), scheme), schemes.quantize(weight, scheme), strict=True):
        assert same_bytes(mine.cpu(), theirs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_on_a_gpu_has_the_bytes_of_one_on_a_cpu_and_answers_alike(name, scheme, tmp_path):
    checkpoint = make_checkpoint(name, tmp_path / name)
    here, there = octavo.load(checkpoint, scheme, "cuda"), octavo.load(checkpoint, scheme)
    mine, theirs = state(here), state(there)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.is_cuda, key
        assert same_bytes(tensor.detach().cpu(), theirs[key].detach()), key
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = here(ids.cuda()).logits, there(ids).logits
    assert torch.nn.functional.cosine_similarity(a.cpu().float().flatten(), b.float().flatten(), 0) > 0.98


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named_on_a_gpu(scheme, value, tmp_path):
    checkpoint = make_checkpoint("qwen3", tmp_path / "qwen3")  # sides that all schemes take
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(WeightError, match=rf"'{name}' holds {value} \(at \[3, 5\]\)"):
        octavo.load(checkpoint, scheme, "cuda")
    with pytest.raises(WeightError, match=rf"'{name}' holds {value} \(at \[3, 5\]\)"):
        list(octavo.stream(checkpoint, scheme, "cuda"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("staging_bytes", [1 << 20, 16 << 20, 256 << 20])
def test_the_device_peak_is_the_model_and_the_staging_budget(scheme, staging_bytes, tmp_path):
    save_file({"a.up_proj.weight": random_weights((4096, 8192), torch.bfloat16, 0)}, tmp_path / "model.safetensors")
    from octavo.checkpoint.checkpoint import Checkpoint
    from octavo.planning.plan import plan_checkpoint
    from octavo.streaming.sinks import ParameterSink, Storage
    from octavo.streaming.stream import Stream

    checkpoint = Checkpoint.open(tmp_path)
    plan = plan_checkpoint(checkpoint, octavo.Recipe(scheme), staging_bytes, "cuda")
    storages = {p.name: Storage.allocate(p) for p in plan.placements}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Stream(checkpoint, plan, ParameterSink(storages)).run()
    # two-reading schemes keep a row's amax each, a few KiB
    assert torch.cuda.max_memory_allocated() - before <= staging_bytes + (1 << 20)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_quantizing_a_transposed_weight_takes_its_result_and_little_more(scheme, dtype):
    weight = random_weights((2, 2880, 4096), dtype, 0).cuda().mT
    schemes.quantize(weight[..., :256, :], scheme)  # constants
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q, scale = schemes.quantize(weight, scheme)
    over = torch.cuda.max_memory_allocated() - before - q.nbytes - scale.nbytes
    assert over <= 16 * scale.numel() + (8 << 20)  # interim results of four bytes a scale
    for mine, theirs in zip((q, scale), schemes.quantize(weight.cpu(), scheme), strict=True):
        assert same_bytes(mine.cpu(), theirs)


def test_a_conversion_on_a_gpu_writes_the_same_bytes(tmp_path):
    checkpoint = make_checkpoint("qwen2_moe", tmp_path / "moe")
    for device in ("cpu", "cuda"):
        octavo.convert(checkpoint, tmp_path / device, device=device)
    assert (tmp_path / "cuda" / "model.safetensors").read_bytes() == (
        tmp_path / "cpu" / "model.safetensors"
    ).read_bytes()
