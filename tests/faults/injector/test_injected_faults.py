"""Calls of the C library that fail, one at a time, in all that octavo does: the right bytes, or a clear error.

The first fault of each kind is put at a few of its calls; all faults at all calls: `make faults`.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _cases import FAULTS, OPERATIONS, run_cases
from _shim import KINDS, compiled, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
#: kinds of calls that each operation makes
CALLED = {
    "resume": {*KINDS} - {"map"},
    "verify": {"open", "read", "close", "stat", "memory"},
    "stream": {"open", "read", "close", "stat", "thread", "memory"},
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is one: hundreds of conversions would wait for the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.parametrize("operation", CALLED)
def test_whatever_call_fails_the_bytes_are_right_or_an_error_says_why(operation: str, shim: Path, place: Path) -> None:
    counts, *found = run_cases(shim, place, operation, "quick")
    assert {kind for kind, count in counts["counts"].items() if count} >= CALLED[operation]
    struck = Counter(case["kind"] for case in found)
    assert all(struck[kind] for kind in CALLED[operation]), struck
    assert _wrong(found) == []


def test_a_call_that_is_interrupted_or_falls_short_is_gone_on_with(shim: Path, place: Path) -> None:
    found = run_cases(shim, place, "convert", "write:short", "write:EINTR", "read:short", "read:EINTR")[1:]
    assert len(found) > 40
    assert _wrong(found) == []
    assert {case["outcome"] for case in found} == {"right"}


def _wrong(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"{case['name']} of {case['call']}: {case['problems']} {case['text']}" for case in found if case["problems"]
    ]


def test_every_kind_of_call_has_its_faults() -> None:
    assert tuple(FAULTS) == KINDS
    assert {*CALLED} < {*OPERATIONS}
