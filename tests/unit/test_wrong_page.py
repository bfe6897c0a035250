"""The page of what can go wrong: its tests exist, and every fault that is injected is on it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "what-can-go-wrong.md"


def rows() -> list[list[str]]:
    """Fault, where it is injected, outcome, test."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "test"]


def test_every_row_names_a_test_that_exists() -> None:
    there = set()
    for path in TESTS.rglob("test_*.py"):
        there |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert len(rows()) >= 40
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        assert row[-1].strip("`") in there, f"no such test: {row[-1]}"
    named = re.findall(r"`(test_\w+)`", PAGE.read_text())
    assert {*named} <= there


def test_every_fault_that_is_injected_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS / "faults" / "injector"))
    from _cases import FAULTS

    text = PAGE.read_text()
    for kind, names in FAULTS.items():
        assert f"`{kind}`" in text, kind
        for name in names:
            error = name.rstrip("+").removeprefix("after ")
            assert not error.startswith("E") or re.search(rf"\b{error}\b", text), error
    sys.modules.pop("_cases", None)
