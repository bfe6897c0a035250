"""Texts of others on their way to a terminal: nothing in them is obeyed, and nothing of them becomes a second line."""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

import pytest

from octavo.errors import CheckpointError, CoverageError, Lines, UpdateError, raise_problems
from octavo.text import on_terminal, one_line, printable, prose, remark, shown, table_text, told

HOSTILE = "a\x1b]0;pwned\x07\x1b[31m\r\nall bytes equal\u202egnp\ud800\x9b\u2028.weight"
SAFE = r"a\x1b]0;pwned\x07\x1b[31m\r\nall bytes equal\u202egnp\ud800\x9b\u2028.weight"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable(HOSTILE) == SAFE
    assert SAFE.encode()  # it can be written


@pytest.mark.parametrize("text", ["model.layers.0.weight", "Gewürz/重み [fp16]", r"re:.*\.mlp", "a [/b]", ""])
def test_other_names_stay_as_they_are(text: str) -> None:
    assert printable(text) == one_line(text) == text


def test_prose_keeps_its_lines_and_its_emoji_but_no_controls() -> None:
    assert prose("👩‍🚀 says:\n\thi\x1b[2J\r") == "👩‍🚀 says:\n\thi\\x1b[2J\\r"


def test_long_lines_lose_their_middle() -> None:
    line = one_line("a" * 50_000 + "z")
    assert len(line) < 2100
    assert "[... 48,001 characters ...]" in line
    assert line.endswith("z")


def test_values_are_shown_short_whatever_they_are() -> None:
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    for value in (deep, [10**4000] * 20_000, "x" * 10**6, {str(i): i for i in range(9999)}):
        assert len(shown(value)) < 1000
    assert shown(["BF16", 2]) == "['BF16', 2]"


def test_what_an_exception_says_is_one_line() -> None:
    assert told(ValueError("first\n  second\n")) == "ValueError: first second"
    assert told(ValueError()) == "ValueError"


@pytest.mark.parametrize("name", ["llama [fp16]", "a [/b]", ":smile:", "[link=file:///etc/passwd]x[/link]", "]"])
def test_tables_take_no_markup(name: str) -> None:
    text = table_text(name, {"[b]what": "left", "how": "right"}, [(name, "1")])
    assert text.splitlines()[0] == name
    assert text.count(name) == 2


def test_tables_obey_nothing_in_a_cell() -> None:
    text = table_text(HOSTILE, {"what": "left"}, [(HOSTILE,)])
    assert text.replace("\n", "").isprintable()


def test_an_error_is_one_line_whatever_it_names() -> None:
    error = CheckpointError(f"{HOSTILE}: gone")
    assert str(error) == f"{SAFE}: gone"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_each_problem_is_one_line() -> None:
    with pytest.raises(CoverageError) as caught:
        raise_problems(CoverageError, HOSTILE, [HOSTILE, "two\nlines"], "Do this.")
    lines = [f"{SAFE}: 2 problems", f"  - {SAFE}", r"  - two\nlines", "Do this."]
    assert str(caught.value).splitlines() == lines
    assert str(pickle.loads(pickle.dumps(caught.value))).splitlines() == lines


def test_an_update_s_error_keeps_its_lines() -> None:
    error = UpdateError(Lines.of("the update failed: x", HOSTILE), ["a"], [], [])
    assert str(error) == f"the update failed: x\n{SAFE}"


class _Gone(io.StringIO):
    """The terminal of a connection that has ended."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stderr", [None, _closed(), _Gone(), object()], ids=["none", "closed", "gone", "odd"])
def test_a_remark_that_nobody_can_read_is_no_error(
    stderr: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    remark("a line")
    assert not on_terminal()
    assert capsys.readouterr().out == ""
