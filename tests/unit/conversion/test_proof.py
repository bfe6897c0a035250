"""Readers are asked, and one that can't answer ends no conversion."""

from __future__ import annotations

from typing import Any

from octavo.conversion.proof import Absent, Judgement, _ask


class Failing:
    def judge(self, *_: Any) -> Judgement:
        raise KeyError("a module that nobody has")


def test_a_reader_that_fails_is_said_and_no_error() -> None:
    judgement = _ask(Failing(), None, {}, {}, {})
    assert judgement.unproved == "asking it failed: KeyError: 'a module that nobody has'"
    assert not judgement.misread


def test_a_reader_that_is_absent_proves_nothing() -> None:
    assert _ask(Absent("transformers"), None, {}, {}, {}).unproved == "it is not installed"
