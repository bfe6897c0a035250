"""The demonstration's screen: lines end before the edge, curves fit, a log holds no control characters."""

from __future__ import annotations

import io

import pytest

from octavo.demo.screen import Screen
from octavo.streaming.meter import Sample


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def words(*pieces: str) -> list[str]:
    out = io.StringIO()
    screen = Screen(out)
    screen.begin("  FP8  ")
    for piece in pieces:
        screen.write(piece)
    screen.say("next")
    *lines, last = out.getvalue().splitlines()
    assert last == "next"
    return lines


def test_words_are_written_below_one_another() -> None:
    text = "To make one, the printer set sixteen pages on a single sheet."
    lines = words(*(f"{word} " for word in text.split()))
    assert lines[0].startswith("  FP8  To make one,")
    assert all(line.startswith("       ") for line in lines[1:])
    assert max(map(len, lines)) <= 44
    assert " ".join(line[7:] for line in lines) == text


def test_pieces_of_a_word_stay_together() -> None:
    assert words("octa", "vo", " prints") == ["  FP8  octavo prints"]


def test_line_breaks_of_an_answer_stay_and_the_last_ones_go() -> None:
    assert words("one\n\n", "two", "\n") == ["  FP8  one", "", "       two"]


def test_headings_are_bold_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, log = Terminal(), io.StringIO()
    for out in (terminal, log):
        Screen(out).heading("Loading")
    assert terminal.getvalue() == "\n\x1b[1mLoading\x1b[0m\n"
    assert log.getvalue() == "\nLoading\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Screen(plain).heading("Loading")
    assert plain.getvalue() == "\nLoading\n"


def test_without_output_nothing_is_written() -> None:
    screen = Screen(None)
    screen.heading("Loading")
    screen.begin("label")
    screen.write("words")
    screen.end_line()


TRACE = [Sample(at_s=i / 10, placed_bytes=i * 60, rss_bytes=0, device_bytes=0) for i in range(11)]


def test_a_curve_rises_and_stays_under_the_unquantized_model() -> None:
    lines = Screen(io.StringIO()).curve(TRACE, source_bytes=1000, final_bytes=600).splitlines()
    assert "the model, unquantized" in lines[0]
    assert max(map(len, lines)) <= 44
    filled = [len(line[13:].strip()) for line in lines[1:-2]]
    assert filled[:2] == [0, 0]  # room is left below the line
    assert filled == sorted(filled)
    assert any(line.strip().startswith("600 B") for line in lines[1:-2])


def test_a_curve_is_drawn_in_ascii_where_the_output_knows_no_blocks() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Screen(out).curve(TRACE, source_bytes=1000, final_bytes=600).encode("ascii")


def test_without_a_trace_there_is_no_curve() -> None:
    assert Screen(None).curve([], source_bytes=1000, final_bytes=600) == ""
