"""Forecasts of ranks: sums, JSON and the table, without an engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helpers import random_weights, write_checkpoint
from helpers.vllm_toys import Toy
from octavo import Recipe
from octavo.adapters.engine.forecast import Forecast, Rank, Weight, shared_notes
from octavo.adapters.engine.survey import Surveyor
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.planning.plan import plan_checkpoint

LINEAR = Weight("layers.0.up_proj.weight", "fp8_channel", True, "linear", 300, 2, False)
NORM = Weight("layers.0.norm.weight", "bf16", False, "norm", 20, 1, False)
HEAD = Weight("head.weight", "bf16", False, "tied", 100, 1, True)
RANKS = tuple(
    Rank(number, "Model", 1000, 430 + number, 2000 + number, (LINEAR, NORM, HEAD), unread, derived, 10 * number)
    for number, (unread, derived) in enumerate([((), {}), (("a", "b", "c"), {"layers.*.attn": 10})])
)
FORECAST = Forecast("an engine 1.0", "models/x", "fp8_channel", RANKS, ("no scheme is named",))


def test_a_forecast_survives_json() -> None:
    assert Forecast.from_dict(json.loads(json.dumps(asdict(FORECAST)))) == FORECAST
    told = json.loads(json.dumps(FORECAST.to_dict()))
    assert told["ranks"][1]["quantized"] == {"fp8_channel": {"tensors": 2, "bytes": 300}}
    assert told["ranks"][1]["kept"] == {"tied": {"tensors": 1, "bytes": 100}, "norm": {"tensors": 1, "bytes": 20}}
    assert FORECAST.peak_bytes == 2001


def test_notes_that_all_ranks_have_are_said_once() -> None:
    assert shared_notes([["a", "b"], ["a", "c"]]) == ("a", "rank 0: b", "rank 1: c")
    assert shared_notes([["a", "b"]]) == ("a", "b")


def test_the_table_has_a_column_a_rank_and_its_sums() -> None:
    text = FORECAST.table()
    assert "models/x: Model in an engine 1.0" in text
    for words in ("layers.*.up_proj.weight", "rank 0", "rank 1", "tied, through its own loader"):
        assert words in text
    assert "rank 1: 2 tensors, 300 B to fp8_channel" in text
    assert "rank 0: to read 1,000 B, final 430 B, peak at most 1.95 KiB" in text
    assert "rank 1: not read: 3 (a, b, ...)" in text
    assert "rank 0: not read" not in text
    assert "rank 1: filled by no tensor (buffers, rows that pad): 10 B" in text
    assert "rank 0: filled by" not in text
    assert text.endswith("note: no scheme is named")
    assert "rank 1: made of weights after loading, by layers.*.attn: 10 B" in text


@pytest.mark.parametrize(
    ("held", "scheme", "nbytes"),
    [
        ("fp8_channel", "fp8_channel", 256 * 256 + 4 * 256),
        ("int8_packed", "int8_channel", 256 * 256 + 2 * 256),
        ("nvfp4", "nvfp4", 256 * 256 // 2 + 256 * 256 // 16 + 4),
    ],
)
def test_a_weight_takes_what_its_engine_holds_of_it(held: str, scheme: str, nbytes: int, tmp_path: Path) -> None:
    shape = (256, 256)
    tensors = {f"{name}_proj.weight": random_weights(shape, torch.bfloat16, 0) for name in ("gate", "up", "down")}
    tensors["norm"] = random_weights((256,), torch.bfloat16, 9)
    plan = plan_checkpoint(Checkpoint.open(write_checkpoint(tmp_path, tensors)), Recipe(scheme), 1 << 20)
    model = Toy(held)
    found = Surveyor(model, model.load_weights, plan, formats.get("compressed-tensors")).run()
    rank = Rank.of(0, model, found, "cpu", {})
    (down,) = (weight for weight in rank.weights if weight.name == "down_proj.weight")
    assert down.nbytes == nbytes
    assert rank.beside_bytes == (2 * 16 if held == "int8_packed" else 0)  # shapes, which are known
