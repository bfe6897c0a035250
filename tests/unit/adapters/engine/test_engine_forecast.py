"""Forecasts of ranks: sums, JSON and the table, without an engine."""

from __future__ import annotations

import json
from dataclasses import asdict

from octavo.adapters.engine.forecast import Forecast, Rank, Weight

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
