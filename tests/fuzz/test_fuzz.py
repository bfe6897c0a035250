"""A small campaign whose inputs are the same on every run, after all inputs that are committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.oracle import FindingError, judge
from fuzz.targets import TARGETS, Target, make
from fuzz.targets.base import corpus
from fuzz.workplace import workplace

pytest.importorskip("transformers")

_SEED = 1
_ROUNDS = 40


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with workplace() as folder:
        yield make(request.param, folder)


def test_committed_inputs_keep_every_promise(target: Target) -> None:
    found = [f"{file}: {text}" for file in corpus(target.name) if (text := finding(target, file.read_bytes()))]
    assert not found, "\n".join(found)


def test_mutated_inputs_keep_every_promise(target: Target) -> None:
    for number in range(_ROUNDS * target.share):
        data = target.input(_SEED, number)
        text = finding(target, data)
        assert not text, f"input {number} of seed {_SEED}: {text}\n{data[:2000]!r}"


def test_inputs_are_the_same_everywhere(target: Target) -> None:
    with workplace() as folder:
        again = make(target.name, folder)
    assert [target.input(_SEED, number) for number in range(50)] == [again.input(_SEED, number) for number in range(50)]


def test_the_corpus_stays_small() -> None:
    sizes = {name: sum(file.stat().st_size for file in corpus(name)) for name in TARGETS}
    assert sum(sizes.values()) < 200_000, sizes


def finding(target: Target, data: bytes) -> str:
    """What is wrong with an input's outcome; nothing if it is as it should be."""
    try:
        judge(target, data)
    except FindingError as error:
        return str(error)
    return ""


def test_every_seed_belongs_to_a_target() -> None:
    assert {path.name for path in (Path(__file__).parent / "corpus").iterdir()} == set(TARGETS)
