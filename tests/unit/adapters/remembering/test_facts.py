"""What of settings, environment and code counts for a plan that is remembered."""

from __future__ import annotations

import collections
import datetime
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.adapters.remembering import facts


def test_where_a_start_meets_others_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"ranks": 2, "master_port": 1234, "options": ("a", "b"), "engine_id": "x"}
    other = {"ranks": 2, "master_port": 4321, "options": ["a", "b"], "engine_id": "y"}
    assert facts.of_settings(config) == facts.of_settings(other)
    assert facts.of_settings(config) != facts.of_settings({**other, "ranks": 3})
    monkeypatch.setenv("TOY_PORT", "1")
    before = facts.of_environment(["TOY_"])
    monkeypatch.setenv("TOY_PORT", "2")
    monkeypatch.setenv("TOY_RUN_ID", "toy-run-1795835706.76-16662390")
    assert facts.of_environment(["TOY_"]) == before
    monkeypatch.setenv("TOY_KERNEL", "2")
    assert facts.of_environment(["TOY_"]) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([0] * 5000, [0] * 4999 + [1]),
        ({n: n for n in range(5000)}, {n: n for n in range(4999)} | {4999: 0}),
        ({("a", 1)}, {("a", 2)}),
        (collections.deque("ab"), collections.deque("ac")),
        (bytearray(b"a"), bytearray(b"b")),
        (datetime.timedelta(1), datetime.timedelta(2)),
        (re.compile(f"{'a':>300}b"), re.compile(f"{'a':>300}c")),
        (re.compile("a"), re.compile("a", re.I)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_in_collections_counts(one: Any, other: Any) -> None:
    assert facts.of_settings(one) != facts.of_settings(other)
    assert facts.of_settings({"a", "b", ("c", 1)}) == facts.of_settings({("c", 1), "b", "a"})


def test_a_value_of_two_lines_is_no_two_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_A", "1\nTOY_B=2")
    one = facts.of_environment(["TOY_"])
    monkeypatch.setenv("TOY_A", "1")
    monkeypatch.setenv("TOY_B", "2")
    assert facts.of_environment(["TOY_"]) != one


def test_code_in_an_archive_has_the_state_of_the_archive(tmp_path: Path) -> None:
    (tmp_path / "app.pyz").write_bytes(b"code")
    within, itself = str(tmp_path / "app.pyz/toy/module.py"), str(tmp_path / "app.pyz")
    found = facts.states([within, itself, str(tmp_path / "gone.py")])
    assert found[within] == found[itself] is not None
    assert found[str(tmp_path / "gone.py")] is None


def test_what_holds_itself_is_described() -> None:
    config = types.SimpleNamespace(depth=1)
    config.own = [config]
    assert facts.of_settings(config) == facts.of_settings(config)


def test_what_lies_in_slots_counts() -> None:
    class Slotted:
        __slots__ = ("rank",)

        def __init__(self, rank: int) -> None:
            self.rank = rank

    assert facts.of_settings(Slotted(1)) != facts.of_settings(Slotted(2))


@pytest.mark.parametrize("form", [torch.Tensor.clone, torch.Tensor.numpy])
def test_small_tables_and_arrays_count(form: Any) -> None:
    one, same, other = (form(torch.tensor([number], dtype=torch.uint8)) for number in (1, 1, 2))
    assert facts.of_settings(one) == facts.of_settings(same)
    assert facts.of_settings(one) != facts.of_settings(other)
