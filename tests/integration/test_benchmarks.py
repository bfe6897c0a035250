"""What the benchmarks rely on: wrong results are told, parts are merged, checkpoints are the same everywhere."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from _models import make_checkpoint

import octavo

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _loaders
import common
import make_checkpoint as generator


def measured(way: str, folder: Path) -> dict:
    return _loaders.measure(way, folder, "cpu", time.perf_counter(), forward=False)


@pytest.fixture(scope="module", params=["llama", "qwen2_moe", "gpt_oss"])
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)


@pytest.mark.parametrize("way", ["octavo-fp8_channel", "octavo-mxfp8", "transformers-bf16", "safetensors", "ring"])
def test_a_load_that_is_right_passes_the_check(way, checkpoint):
    assert "wrong" not in measured(way, checkpoint)["check"]


def zero(name: str, weight: torch.Tensor) -> None:
    weight.view(torch.uint8).zero_()


def shift(name: str, weight: torch.Tensor) -> None:
    bits = weight.view(torch.uint8)
    bits.copy_(bits.roll(1, 0))


def spoil_the_last_norm(name: str, weight: torch.Tensor) -> None:
    if name == "model.norm.weight":
        weight.fill_(float("nan"))


@pytest.mark.parametrize(
    ("damage", "told"), [(zero, "off by|differs"), (shift, "off by|differs"), (spoil_the_last_norm, "norm.*not finite")]
)
@pytest.mark.parametrize("scheme", ["fp8_channel", None])
def test_a_model_that_is_not_the_checkpoint_is_told(damage, told, scheme, checkpoint, monkeypatch):
    def load_badly(folder, device, probes):
        model = octavo.load(folder, scheme, progress=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                damage(name, parameter)
        return lambda: _loaders.Held(lambda: _loaders.check_model(model, probes, device), model)

    monkeypatch.setitem(_loaders.WAYS, "bad", (load_badly, ()))
    assert re.search(told, measured("bad", checkpoint)["check"]["wrong"])


def test_a_loader_that_skips_tensors_is_told(checkpoint, monkeypatch):
    def load_nothing(folder, device, probes):
        return lambda: _loaders.Held(lambda: probes.check_seen(device))

    monkeypatch.setitem(_loaders.WAYS, "bad", (load_nothing, ()))
    assert "0 bytes were handed out" in measured("bad", checkpoint)["check"]["wrong"]


def test_parts_of_a_result_are_merged_and_runs_that_none_names_are_dropped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for day, parts in (("1", "ab"), ("2", "b"), ("3", "a")):
        monkeypatch.setattr(common.time, "strftime", lambda form, day=day: day)
        merged = common.Merged("try", tmp_path, tmp_path / "out.json")
        for part in parts:
            merged.add({"seconds": int(day)}, "models", part)
        merged.close()
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["models"] == {"a": {"run": "3", "seconds": 3}, "b": {"run": "2", "seconds": 2}}
    assert list(content["runs"]) == ["2", "3"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"] == {"a": {"run": "3", "seconds": 3}}


def test_a_generated_checkpoint_has_the_same_bytes_with_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "_BLOCK_ELEMENTS", 4099)
    monkeypatch.setitem(generator.MODELS, "tiny", (2, lambda layers: generator.llama(layers, vocab=64, inner=64)))
    for threads in (1, 3):
        generator.make("tiny", tmp_path / str(threads), shard_gb=0.05, threads=threads)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_snippet_that_hangs_is_killed_and_one_that_fails_is_told():
    with pytest.raises(common.ChildError, match="killed after 1 s"):
        common.run_fresh("time.sleep(60)", timeout_s=1)
    with pytest.raises(common.ChildError, match="no luck"):
        common.run_fresh("raise ValueError('no luck')")
    found = common.run_fresh("result(late=time.perf_counter() - STARTED_S)", samples=True)
    assert 0 < found["late"] < found["process"]["wall_s"]
