"""What is parsed: numbers, and whether values are of the kind that they should be."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.checkpoint.files import conforms, parse_json


@pytest.mark.parametrize("text", ["-0", "[-0]", '{"a":-0}', "[1,\n-0]", '["a-0", -0]'])
def test_zero_with_a_sign_is_no_integer_wherever_it_stands(text: str) -> None:
    found = parse_json(text.encode())
    while isinstance(found, (list, dict)):
        found = [*(found.values() if isinstance(found, dict) else found)][-1]
    assert type(found) is float


def test_what_looks_like_it_in_a_name_is_text() -> None:
    assert parse_json(b'["model-00001-of-00002", 1]') == ["model-00001-of-00002", 1]


@pytest.mark.parametrize(
    ("value", "kind", "is_one"),
    [
        ({"a": "b"}, dict[str, str], True),
        ({"a": "b", "c": 1}, dict[str, str], False),
        ({1: "b"}, dict[str, str], False),
        ({}, dict[str, str], True),
        ([1, True], list[int], False),
        ([1, 2], list[int], True),
        ([1, None], list[int | None], True),
        ([[1], ["a"]], list[list[Any]], True),
        ([[1], "a"], list[list[Any]], False),
    ],
)
def test_all_values_of_a_list_or_table_are_of_a_kind(value: Any, kind: Any, is_one: bool) -> None:
    assert conforms(value, kind) is is_one
