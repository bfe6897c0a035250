"""Patterns that stand for many names: they match all of those, and none that is quantized."""

from __future__ import annotations

import re

from octavo.conversion.ignoring import _series


def experts(layers: range, count: int = 8, what: str = "up_proj") -> set[str]:
    return {f"model.layers.{layer}.mlp.experts.{expert}.{what}" for layer in layers for expert in range(count)}


def check(names: set[str], taken: set[str]) -> tuple[list[str], list[str]]:
    patterns, single = _series(names, taken)
    compiled = [re.compile(pattern.removeprefix("re:")) for pattern in patterns]
    matched = {name for name in names if any(p.match(name) for p in compiled)}
    assert sorted([*matched, *single]) == sorted(names)
    assert not [name for name in taken if any(p.match(name) for p in compiled)]
    return patterns, single


def test_a_kind_that_stays_everywhere_is_one_pattern() -> None:
    assert check(experts(range(4)), experts(range(4), what="down_proj"))[0] == [
        r"re:(.*\.)?model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"
    ]


def test_a_layer_that_stays_is_one_pattern_of_its_own_number() -> None:
    patterns, single = check(experts(range(1), 16), experts(range(1, 4), 16))
    assert patterns == [r"re:(.*\.)?model\.layers\.0\.mlp\.experts\.\d+\.up_proj$"]
    assert single == []


def test_few_names_stay_names() -> None:
    assert check({"a.0.b", "a.1.b"}, set()) == ([], ["a.0.b", "a.1.b"])


def test_some_experts_of_a_layer_stay_names() -> None:
    names = experts(range(1), 32)
    taken = {name for name in names if int(name.split(".")[5]) % 2}
    assert check(names - taken, taken)[0] == []


def test_no_pattern_matches_the_same_module_below_another_prefix() -> None:
    names = {f"blocks.{n}.proj" for n in range(32)}
    assert check(names, {f"vision.blocks.{n}.proj" for n in range(32)})[0] == []
