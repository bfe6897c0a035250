"""What the benchmarks rely on: wrong results are told, parts are merged, checkpoints are the same everywhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _models import make_checkpoint

import octavo

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _checks
import _engines
import _first_token
import _loaders
import _measure
import _vllm
import common
import make_checkpoint as generator
import plan_cpu
import sglang_gpu
import stream_gpu
import vllm_gpu


def measured(way: str, folder: Path) -> dict:
    return _measure.measure(way, folder, "cpu", time.perf_counter(), forward=False)


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
        return lambda: _loaders.Held(lambda: _checks.check_model(model, probes, device), model)

    monkeypatch.setitem(_measure.WAYS, "bad", (load_badly, ()))
    assert re.search(told, measured("bad", checkpoint)["check"]["wrong"])


def test_a_loader_that_skips_tensors_is_told(checkpoint, monkeypatch):
    def load_nothing(folder, device, probes):
        return lambda: _loaders.Held(lambda: probes.check_seen(device))

    monkeypatch.setitem(_measure.WAYS, "bad", (load_nothing, ()))
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


def test_a_checkpoint_without_data_has_the_headers_and_sizes_of_one_with_data(tmp_path, monkeypatch):
    monkeypatch.setitem(generator.MODELS, "tiny", (2, lambda layers: generator.llama(layers, vocab=64, inner=64)))
    facts = [
        generator.make("tiny", tmp_path / name, shard_gb=0.05, sparse=name == "sparse") for name in ("full", "sparse")
    ]
    assert facts[0] == facts[1]
    for path in sorted((tmp_path / "full").iterdir()):
        sparse = tmp_path / "sparse" / path.name
        if path.suffix == ".json":
            assert sparse.read_bytes() == path.read_bytes()
            continue
        with sparse.open("rb") as mine, path.open("rb") as whole:
            length = int.from_bytes(mine.read(8), "little")
            assert whole.read(8 + length) == length.to_bytes(8, "little") + mine.read(length)
        assert sparse.stat().st_size == path.stat().st_size
        assert sparse.stat().st_blocks * 512 < path.stat().st_size / 10


def test_a_snippet_that_hangs_is_killed_and_one_that_fails_is_told():
    with pytest.raises(common.ChildError, match="killed after 1 s"):
        common.run_fresh("time.sleep(60)", timeout_s=1)
    with pytest.raises(common.ChildError, match="no luck"):
        common.run_fresh("raise ValueError('no luck')")
    with pytest.raises(common.ChildError, match="exit code 1") as failed:
        common.run_fresh("print('first')\nresult(a=1)\nresult(a=2)\nprint('x\\n' * 99)\nraise SystemExit(1)")
    assert failed.value.found == {"a": 2}
    assert failed.value.output.startswith("first")
    found = common.run_fresh("result(late=time.perf_counter() - STARTED_S)", samples=True)
    assert 0 < found["late"] < found["process"]["wall_s"]


@pytest.mark.parametrize("end", ["time.sleep(60)", "os._exit(1)", "result()"])
def test_what_a_snippet_has_started_ends_with_it(end, tmp_path):
    started = tmp_path / "pid"
    code = "import subprocess\nfrom pathlib import Path\nother = subprocess.Popen(['sleep', '60'])\n"
    code += f"Path({str(started)!r}).write_text(str(other.pid))\n{end}"
    with contextlib.suppress(common.ChildError):
        common.run_fresh(code, timeout_s=3)
    pid = started.read_text()
    ends = time.perf_counter() + 10
    while Path("/proc", pid).exists() and " Z " not in Path("/proc", pid, "stat").read_text():
        assert time.perf_counter() < ends
        time.sleep(0.01)


# -- vLLM -------------------------------------------------------------------------------------------------------------


def test_vllm_finds_the_plugin_where_octavo_is_not_installed(tmp_path):
    code = (
        "from importlib.metadata import entry_points\n"
        "found = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'octavo']\n"
        "print(len(found), {e.load().__module__ for e in found})\n"
    )
    path = [str(_engines.plugin_path(tmp_path, _vllm.PLUGINS, _vllm.PLUGIN)), str(common.ROOT / "src"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-S", "-c", code]  # without this environment's own packages, but those of PYTHONPATH
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.split(maxsplit=1)[1].strip() == "{'octavo.adapters.vllm'}"
    assert int(out.split()[0]) >= 1
    # as the package declares it
    assert 'octavo = "octavo.adapters.vllm:register"' in (common.ROOT / "pyproject.toml").read_text()


def answers(*logprobs: float, tokens: tuple[int, ...] = (1, 2)) -> dict:
    return {"tokens": [list(tokens)], "logprobs": [list(logprobs)], "sums": [{"a": str(logprobs)}]}


def test_answers_of_two_engines_are_compared():
    same = _engines.compare(answers(-1.0, -2.0, -3.0), answers(-1.0, -2.0, -3.0))
    assert same["equal"]
    assert same["equal_parameters"]
    other = _engines.compare(answers(-1.0, -2.0, -3.0), answers(-1.5, -2.5, -3.5, tokens=(1, 7)))
    assert not other["equal"]
    assert not other["equal_parameters"]
    assert (other["mean_difference"], other["correlation"]) == (0.5, 1.0)
    assert (other["same_tokens"], other["same_first_tokens"]) == (0.5, 1.0)


@pytest.mark.parametrize(("load_s", "over_gib", "equal"), [(2.0, 0.2, True), (2.1, 0.2, True), (2.0, 0.4, False)])
def test_promises_about_loading_into_vllm(load_s, over_gib, equal):
    twin = {"equal": equal, "equal_parameters": None, "mean_difference": 0, "correlation": 1.0}
    twin |= {"same_tokens": 1.0, "same_first_tokens": 1.0}
    speed = {"prefill": {"tokens_per_s": 1.0}, "decode": {"1": {"tokens_per_s": 1.0}}, "gb_per_s": 1.0, "start_s": 1.0}
    speed |= {"reserved_share": 1.01}
    mine = {"load_s": load_s, "final_bytes": 1, "over_bytes": int(over_gib * vllm_gpu.GIB), **speed}
    rows = {
        "octavo-fp8_channel tp1": {**mine, "against": {"converted-fp8_channel": twin}},
        "fp8_per_tensor tp1": {"load_s": 6.0, "final_bytes": 1, "over_bytes": 1, **speed},
        "bf16 tp1": {"error": "no luck"},
    }
    alone = vllm_gpu.Ranks(1)
    kept = vllm_gpu.promises("octavo-fp8_channel", alone, rows)
    assert kept == {"over": over_gib <= 0.25, "reserved": True, "faster": load_s <= 2.0, "equal": equal}
    rows["octavo-fp8_channel tp1"]["promises"] = kept
    told = vllm_gpu.table(rows)
    assert "no luck" in told
    assert ("not as promised" in told) == (not all(kept.values()))
    assert vllm_gpu.promises("fp8_per_tensor", alone, rows) == {}


@pytest.mark.parametrize(
    ("load_s", "reserved", "read"), [(1.3, 1.02, 7), (1.4, 1.02, 7), (1.3, 1.03, 7), (1.3, 1.0, 8)]
)
def test_promises_about_several_ranks(load_s, reserved, read):
    memory = {"over_bytes": 0, "reserved_share": reserved}
    together = vllm_gpu.Ranks.parse("2e")
    rows = {
        "octavo-fp8_block tp1": {**memory, "load_s": 2.0},
        "octavo-fp8_block tp2 ep": {**memory, "load_s": load_s, "read_bytes": [6, read], "forecast_bytes": [6, 7]},
        "fp8_per_tensor tp2 ep": {"load_s": 3.25},
    }
    kept = vllm_gpu.promises("octavo-fp8_block", together, rows)
    assert kept == {
        "over": True,
        "reserved": reserved <= 1.02,
        "read as forecast": read == 7,
        "faster": load_s <= 1.3,
        "faster together": load_s <= 1.3,
    }


def test_rows_of_sglang_are_written_as_they_come(tmp_path, monkeypatch, capsys):
    """Also where one fails; and octavo's, which come first, are compared with what comes later."""
    made, asked, failed = tmp_path / "result.json", [], common.ChildError("no luck")
    memory = {"allocated_bytes": 1, "allocated_peak_bytes": 1, "reserved_peak_bytes": 1}

    def started(_, way, source, answers, options, **how):
        asked.append((way, sorted(json.loads(made.read_text())["models"]["llama3-8b"])))
        if way == "octavo-fp8_block":
            raise OSError("no disk")
        ranks = [{"load_s": 1.0, "after": memory, "log": ["octavo: 1.0 s"]}]
        found = {"ranks": ranks, "ready_at_s": 0, "start_s": 2.0, "doing": "answers"}
        if way == "fp8":  # loads, and fails in answering
            failed.found, failed.output = found, "rank 0: ValueError: no kernel\nand so on"
            raise failed
        said = {"tokens": [[1, 2], [2, 1]], "logprobs": [[0.5, 0.25], [0.125, 1.0]], "sums": None}
        answers.write_text("{" if way == "bf16" else json.dumps(said))
        return {**found, "samples": []}

    monkeypatch.setattr(sglang_gpu, "run_fresh", started)
    monkeypatch.setattr(sglang_gpu, "source_of", lambda way, folder, *_: folder)
    monkeypatch.setattr(sglang_gpu.make_checkpoint, "make", lambda *_: {"bytes": 1})
    monkeypatch.setattr(sglang_gpu.common, "set_cache", lambda *_, **__: 1.0)
    monkeypatch.setattr(sglang_gpu, "plugin_path", lambda *_: tmp_path)
    for name in ("PYTHONPATH", "OCTAVO_CACHE", *sglang_gpu._sglang.ENVIRONMENT):
        monkeypatch.setenv(name, "")
    given = ["--folder", tmp_path, "--device", "cpu", "--models", "llama3-8b", "--again", "--output", made]
    ways = ["octavo-fp8_channel", "converted-fp8_channel", "fp8", "octavo-fp8_block", "bf16"]
    monkeypatch.setattr(sys, "argv", ["sglang_gpu.py", *map(str, given), "--ways", *ways])
    with pytest.raises(SystemExit, match="1"):
        sglang_gpu.main()
    assert "then: failed during answers: rank 0: ValueError: no kernel" in capsys.readouterr().err
    rows = ["octavo-fp8_channel tp1", "octavo-fp8_channel tp1 again", "converted-fp8_channel tp1"]
    rows += ["fp8 tp1", "octavo-fp8_block tp1"]  # which has no second start
    before = [sorted(["checkpoint", *rows[:count]]) for count in range(6)]
    assert asked == list(zip(["octavo-fp8_channel", *ways], before, strict=True))
    found = json.loads(made.read_text())["models"]["llama3-8b"]
    assert found[rows[0]]["promises"] == {"over": True, "faster": False, "equal": True}
    assert found[rows[1]]["log"] == ["octavo: 1.0 s"]
    said = "failed during answers: rank 0: ValueError: no kernel"
    assert found["fp8 tp1"]["error"].splitlines() == [said, "rank 0: ValueError: no kernel", "and so on"]
    assert found["fp8 tp1"]["load_s"] == 1.0
    assert (tmp_path / "llama3-8b.sglang-answers" / "fp8-tp1.log").read_text() == failed.output
    assert found["octavo-fp8_block tp1"] == {"run": found["fp8 tp1"]["run"], "error": "OSError: no disk"}
    assert "can't be compared: JSONDecodeError" in found["bf16 tp1"]["error"]
    assert found["bf16 tp1"]["start_s"] == 2.0


def test_a_start_of_sglang_that_was_ended_says_when_and_during_what():
    lines = "pixtral: ImportError: No module named 'cutlass'\nPrefill batch"
    with pytest.raises(common.ChildError) as ended:
        common.run_fresh(f"result(doing='answers')\nprint({lines!r}, flush=True)\ntime.sleep(60)", timeout_s=2)
    said = sglang_gpu.reason(ended.value).splitlines()
    assert said[0] == "ended after 2 s, during answers. The last that it said:"
    assert said[1:] == lines.splitlines()


def test_what_would_not_fit_is_not_started(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_engines.time, "perf_counter", lambda: now[0])
    budget = _engines.Budget(100, 60, least_s=45)
    assert budget.timeout_s() == 60
    now[0] = 50
    assert budget.timeout_s() == 50
    budget.took(20)  # also one that failed
    now[0] = 70
    assert budget.timeout_s() == 30
    now[0] = 79
    assert (budget.timeout_s(), budget.why()) == (None, "not started: 21 s are left, and 22 s are needed")
    assert _engines.Budget(40, 60, least_s=45).timeout_s() is None


def test_what_engines_are_asked_by_default_fits_the_models():
    for model in ("qwen1.5-moe-a2.7b", "llama3-8b"):
        config, _ = generator.MODELS[model][1](1)
        assert config.get("max_position_embeddings", 8192) >= 4096


def test_a_stream_is_measured_with_and_without_its_parts(checkpoint):
    streams = stream_gpu.Streams(checkpoint, "fp8_channel", torch.device("cpu"), 64 << 20)
    whole = {way: streams.run(way, 2, 0.5) for way in stream_gpu.WAYS}
    assert all(found["s"] > 0 for found in whole.values())
    assert whole["unread"]["reading_s_all_threads"] == 0 < whole["stream"]["reading_s_all_threads"]
    assert streams.cut()["boxes"] > 0
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_planning_is_measured_without_data(tmp_path, monkeypatch):
    monkeypatch.setitem(generator.MODELS, "tiny", (2, lambda layers: generator.qwen_moe(layers, 4, 64, v3=True)))
    facts = generator.make("tiny", tmp_path, sparse=True)
    runs = [plan_cpu.measure(tmp_path, "fp8_channel") for _ in range(2)]
    found = plan_cpu.condense(runs)
    assert found["tensors"] == facts["tensors"] > found["parameters"]  # experts are stacked
    assert found["read_bytes"] == facts["bytes"]
    assert found["blocks"] <= found["boxes"]
    assert all(found[name]["median"] > 0 for name in plan_cpu.SECONDS)


@pytest.mark.parametrize("way", ["bf16", "octavo-fp8_channel", "config-fp8_block"])
def test_steps_to_the_first_token_are_counted_in_order(way, tmp_path):
    folder = make_checkpoint("llama", tmp_path / "llama")
    found = _first_token.measure(way, folder, "cpu", time.perf_counter(), 4)
    assert list(found["at_s"]) == ["python", "torch", "loaded", "first token", "second token"]
    assert [*found["at_s"].values()] == sorted(found["at_s"].values())
    assert ("stages_s" in found) == (way != "bf16")
