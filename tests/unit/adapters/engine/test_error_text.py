"""Errors of engines in a few words."""

from __future__ import annotations

import pytest

from octavo.adapters.engine.survey import error_text, whole_text


class Layer:
    def __init__(self, heads: int) -> None:
        self.heads = heads

    def cut(self, ranks: int) -> None:
        assert self.heads % ranks == 0


def test_an_assertion_without_a_word_is_quoted_with_its_numbers() -> None:
    with pytest.raises(AssertionError) as caught:
        exec(compile("def cut(heads, ranks):\n    assert heads % ranks == 0\ncut(3, 2)", "<nowhere>", "exec"), {})
    assert error_text(caught.value) == "AssertionError"  # no source is at hand
    error = AssertionError()
    try:
        Layer(3).cut(2)
    except AssertionError as raised:
        error = raised
    error.args = ()  # pytest has words of its own
    assert error_text(error) == "AssertionError: assert self.heads % ranks == 0 (self.heads = 3, ranks = 2)"
    assert whole_text(error) == error_text(error)


def test_other_errors_keep_their_words() -> None:
    assert error_text(ValueError("no such thing")) == "ValueError: no such thing"
    assert error_text(AssertionError("heads")) == "AssertionError: heads"


def test_many_words_are_cut_only_where_few_are_wanted() -> None:
    many = " ".join(["word"] * 60)
    assert whole_text(ValueError(many)) == f"ValueError: {many}"
    assert error_text(ValueError(many)).endswith(" ...")
