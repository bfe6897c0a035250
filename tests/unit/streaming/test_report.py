"""Reports: numbers that add up, as a table, as JSON, as a picture."""

from __future__ import annotations

import gc
import io
import json
import mmap
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from helpers import random_weights, run_plan, threads_of_octavo, write_checkpoint
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import MissingExtraError
from octavo.machine import rss_bytes
from octavo.planning.budget import Budget
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.streaming import meter as meters
from octavo.streaming.meter import Stages, collection_paused, measured, progress_bar
from octavo.streaming.report import Report
from octavo.streaming.sinks import ParameterSink, Storage
from octavo.streaming.stream import Stream, Tally
from octavo.text import human_bytes


@pytest.fixture
def plan_and_report(tmp_path):
    tensors = {
        "model.embed_tokens.weight": random_weights((50, 96), torch.bfloat16, 0),
        "model.layers.0.mlp.up_proj.weight": random_weights((300, 96), torch.bfloat16, 1),
        "model.layers.1.mlp.up_proj.weight": random_weights((300, 96), torch.bfloat16, 2),
        "model.norm.weight": random_weights((96,), torch.bfloat16, 3),
    }
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors))
    plan = plan_checkpoint(checkpoint, Recipe())
    stages = Stages()
    with measured(plan, progress=False) as meter:
        stream = Stream(checkpoint, plan, ParameterSink({p.name: Storage.allocate(p) for p in plan.placements}))
        meter.follow(stream.tally)
        with stages("stream"):
            stream.run()
    return plan, Report.of(plan, stream.budget, stream.tally, stages, meter, notes=["mind the gap"])


def test_a_report_adds_up(plan_and_report):
    plan, found = plan_and_report
    assert found.source_bytes == plan.source_bytes == found.read_bytes
    assert found.final_bytes == plan.final_bytes()
    assert found.quantized == {"fp8_channel": (2, 2 * (300 * 96 + 300 * 4))}
    assert found.kept == {"embedding, kept by default": (1, 9600), "norm": (1, 192)}
    assert sum(n for _, n in (*found.quantized.values(), *found.kept.values())) == found.final_bytes
    assert found.peak_bytes == found.final_bytes + found.staging_bytes
    assert found.trace[-1].placed_bytes == found.final_bytes
    assert found.total_s == found.seconds["stream"] > 0
    assert found.read_gb_per_s == pytest.approx(found.read_bytes / found.seconds["stream"] / 1e9)
    assert threads_of_octavo() == []


def test_a_report_is_json_able(plan_and_report):
    _, found = plan_and_report
    data = json.loads(json.dumps(found.to_dict()))
    assert data["quantized"]["fp8_channel"]["tensors"] == 2
    assert data["final_bytes"] == found.final_bytes
    assert len(data["trace"]) == len(found.trace)
    assert set(data) >= set(Report.__dataclass_fields__)


def test_the_table_tells_what_became_of_what(plan_and_report):
    plan, found = plan_and_report
    text = str(found)
    assert plan.source in text.replace("\n", "")
    for words in ("to fp8_channel", "2 tensors, 58.59 KiB", "kept: embedding, kept by default", "mind the gap"):
        assert words in text
    assert all(len(line) <= 140 for line in text.splitlines())


def test_the_plot_is_a_png(plan_and_report, tmp_path):
    pytest.importorskip("matplotlib")
    plan_and_report[1].plot(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_plotting_without_matplotlib_names_the_extra(plan_and_report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'octavo\[plot\]'"):
        plan_and_report[1].plot(tmp_path / "memory.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1.00 KiB"),
        (12345678, "11.77 MiB"),
        (28 << 30, "28.00 GiB"),
        (5000 << 30, "5,000.00 GiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_are_written_for_people(count, text):
    assert human_bytes(count) == text


def test_the_example_of_human_bytes_is_true():
    assert f"'{human_bytes(12345678)}'" in human_bytes.__doc__


def test_stages_add_up():
    stages = Stages()
    for _ in range(2):
        with stages("a"):
            pass
    with pytest.raises(ValueError, match="counted all the same"), stages("b"):
        raise ValueError("counted all the same")
    assert set(stages.seconds) == {"a", "b"}
    assert min(stages.seconds.values()) > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_made_while_collection_is_paused_counts_as_old_after(frozen: bool):
    gc.collect()
    if frozen:
        gc.freeze()
    try:
        with collection_paused():
            assert not gc.isenabled()
            made = [[] for _ in range(10)]
        assert gc.isenabled()
        assert bool(gc.get_freeze_count()) == frozen
        assert frozen or any(found is made for found in gc.get_objects(generation=2))
    finally:
        gc.unfreeze()


def test_a_collection_that_is_asked_for_meanwhile_looks_at_what_is_new():
    class Node:
        itself: object

    def cycle():
        node = Node()
        node.itself = node
        return weakref.ref(node)

    gc.disable()
    before = cycle()
    gc.enable()
    with collection_paused():
        after = cycle()
        gc.collect()
        assert before() is not None
        assert after() is None
    gc.collect()
    assert before() is None


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_callback_is_used_as_it_is():
    told: list[tuple[int, int]] = []

    def callback(done: int, total: int) -> None:
        told.append((done, total))

    with progress_bar(callback, "Loading") as found:
        assert found is not None
        found(1, 2)
    assert told == [(1, 2)]


def test_no_bar_is_drawn_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for progress in (False, None):
        with progress_bar(progress, "Loading") as found:
            assert found is None


def test_a_bar_is_drawn_on_stderr_where_it_is_wanted(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(None, "Loading") as callback:
        callback(5 << 20, 10 << 20)
    assert "Loading" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_a_failed_stream_ends_the_meter_too(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"a": torch.ones(3)}))
    with pytest.raises(RuntimeError, match="failed"), measured(plan_checkpoint(checkpoint, Recipe()), False):
        raise RuntimeError("failed")
    assert threads_of_octavo() == []


def test_resident_memory_grows_with_what_is_allocated():
    before = rss_bytes()
    with mmap.mmap(-1, 256 << 20) as block:  # not of an allocator, which may have as much at hand
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
        assert rss_bytes() - before > 128 << 20


def test_the_table_of_a_plan_groups_layers(tmp_path):
    checkpoint = Checkpoint.open(
        write_checkpoint(tmp_path, {f"layers.{i}.w.weight": torch.ones(8, 8).bfloat16() for i in range(3)})
    )
    lines = [line for line in plan_checkpoint(checkpoint, Recipe()).table().splitlines() if "layers.*" in line]
    assert len(lines) == 1
    assert " 3 " in lines[0]
    run_plan(checkpoint, plan_checkpoint(checkpoint, Recipe()))


def test_a_report_tells_the_peak_of_each_device(tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"a": torch.zeros(64), "b": torch.zeros(32)}))
    made = plan_checkpoint(checkpoint, Recipe(None))
    devices = ("cuda:0", "cuda:1")
    placements = [replace(p, device=d) for p, d in zip(made.placements, devices, strict=True)]
    plan = replace(made, placements=tuple(placements))
    held = {torch.device(device): 1000 for device in devices}
    monkeypatch.setattr(meters, "_allocated_bytes", held.get)
    with measured(plan, progress=False) as meter:
        held.update({torch.device("cuda:0"): 1000 + 300, torch.device("cuda:1"): 1000 + 128})
    found = Report.of(plan, Budget.fit(made.placements, made.staging_bytes), Tally(), Stages(), meter)
    assert found.devices == {
        "cuda:0": {"final_bytes": 256, "peak_bytes": 300},
        "cuda:1": {"final_bytes": 128, "peak_bytes": 128},
    }
    assert found.device_peak_bytes == 428
    told = " ".join(str(found).split())
    assert "cuda:0, peak over final │ 44 B over 256 B" in told
    assert "cuda:1, peak over final │ 0 B over 128 B" in told
