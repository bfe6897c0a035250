"""Stacks of experts are cut by the names that readers take, whether one is asked, or several, or none can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from helpers import headers
from octavo.conversion import formats
from octavo.conversion.proof import Judgement, Proof, prove
from octavo.planning.recipe import Recipe
from octavo.streaming.meter import Stages

STACKS = {
    f"m.{layer}.mlp.experts.{name}": shape
    for layer in range(2)
    for name, shape in {"gate_up_proj": (3, 64, 128), "down_proj": (3, 128, 32)}.items()
}
PROJ, FUSED, LETTERS = "gate_proj", "gate_up_proj", "w1"


class Fake:
    """A reader that takes experts by names with one of some words in them.

    Args:
        says: how it speaks of others: `misread`, `refused` or `unexpected`.
        waiting: a module that has to be ignored before it reads anything right.
    """

    def __init__(self, name: str, *takes: str, says: str = "unexpected", waiting: str = "") -> None:
        self.name, self.takes, self.says, self.waiting, self.asked = name, takes, says, waiting, 0

    def judge(
        self, checkpoint: Any, tensors: Mapping[str, Any], scales: Mapping[str, str], config: Mapping[str, Any]
    ) -> Judgement:
        self.asked += 1
        if self.waiting and self.waiting not in config["quantization_config"]["ignore"]:
            return Judgement(self.name, waiting=(self.waiting,), refused=dict.fromkeys(scales, "it does not start"))
        leaves = {name.split(".")[-2] for name in scales if ".experts." in name}
        bad = [name for name in scales if ".experts." in name and leaves.isdisjoint(self.takes)]
        if self.says == "unexpected":
            return Judgement(self.name, unexpected=tuple(bad))
        return Judgement(self.name, **{self.says: dict.fromkeys(bad, "no such module")})


class Silent:
    def judge(self, *_: Any) -> Judgement:
        return Judgement("nobody", unproved="it is not installed")


def proved(*readers: Any, recipe: Recipe | None = None, shapes: Mapping[str, Sequence[int]] = STACKS) -> Proof:
    checkpoint = headers({**shapes, "m.q_proj.weight": (64, 64)}, config={"architectures": ["Any"]})
    layout = formats.get("compressed-tensors")

    def plan_with(veto: Any, cuts: Any) -> Any:
        return formats.plan_for(checkpoint, recipe or Recipe(), layout.name, 1 << 28, "cpu", veto, cuts)[0]

    find: Callable[[], Sequence[Any]] | None = (lambda: readers) if readers else None
    return prove(checkpoint, plan_with, layout, find, Stages())


def leaves(proof: Proof) -> set[str]:
    """What experts' quantized matrices are called."""
    return {placement.name.split(".")[-2] for placement in proof.plan.quantized if "experts" in placement.name}


def reasons(proof: Proof) -> set[str]:
    return {placement.reason for placement in proof.plan.kept}


@pytest.mark.parametrize(
    ("takes", "found"),
    [
        (PROJ, {"gate_proj", "up_proj", "down_proj"}),
        (FUSED, {"gate_up_proj", "down_proj"}),
        (LETTERS, {"w1", "w2", "w3"}),
    ],
)
@pytest.mark.parametrize("says", ["misread", "refused", "unexpected"])
def test_the_names_are_those_that_the_reader_takes(takes: str, found: set[str], says: str) -> None:
    proof = proved(Fake("one", takes, says=says))
    assert leaves(proof) == found
    assert reasons(proof) == set()
    assert proof.notes == ("proved: one reads all that it takes as it is meant",)


def test_the_names_are_those_that_all_readers_take() -> None:
    assert leaves(proved(Fake("one", PROJ, LETTERS), Fake("two", LETTERS, FUSED, says="misread"))) == {"w1", "w2", "w3"}


@pytest.mark.parametrize("says", ["misread", "refused", "unexpected"])
def test_stacks_stay_where_no_reader_takes_their_matrices(says: str) -> None:
    proof = proved(Fake("one 1.0", says=says), Silent())
    assert {placement.name for placement in proof.plan.kept} == STACKS.keys()
    (reason,) = reasons(proof)
    assert reason.startswith(
        "expert stack: stock readers take no quantized 3-D tensors, and one 1.0 takes none of its "
    )
    assert len(proof.plan.quantized) == 1


def test_a_long_error_is_told_in_short() -> None:
    class Wordy(Fake):
        def judge(self, *case: Any) -> Judgement:
            found = super().judge(*case)
            return Judgement(found.reader, refused=dict.fromkeys(found.refused, "word " * 200))

    (reason,) = reasons(proved(Wordy("one", says="refused")))
    assert reason.endswith("word ...)")
    assert len(reason) < 300


def test_one_reader_is_enough_if_the_other_says_that_it_can_t() -> None:
    proof = proved(Fake("one"), Fake("two", FUSED, says="misread"))
    assert leaves(proof) == {"gate_up_proj", "down_proj"}
    assert proof.notes[0] == ("stacks of experts are matrices for two, which one can't load: it has no place for them")


def test_what_a_reader_would_misread_without_a_word_is_not_written_for_another() -> None:
    proof = proved(Fake("one", says="misread"), Fake("two", FUSED))
    assert leaves(proof) == set()
    assert "one takes none of its matrices (no such module)" in reasons(proof).pop()


def test_other_modules_are_settled_before_names_are_given_up() -> None:
    reader = Fake("one", PROJ, says="refused", waiting="m.vision")
    proof = proved(reader)
    assert leaves(proof) == {"gate_proj", "up_proj", "down_proj"}
    assert proof.quantization is not None
    assert "m.vision" in proof.quantization["ignore"]
    assert reader.asked == 2


def test_one_naming_is_asked_about_once() -> None:
    reader = Fake("one", LETTERS)
    proved(reader)
    assert reader.asked == 3


def test_a_reader_is_not_asked_again_about_names_that_another_has_no_place_for() -> None:
    first, second = Fake("one", LETTERS), Fake("two", PROJ, LETTERS)
    assert leaves(proved(first, second)) == {"w1", "w2", "w3"}
    assert (first.asked, second.asked) == (3, 2)
    first, second = Fake("one"), Fake("two", PROJ, FUSED)
    assert leaves(proved(first, second)) == {"gate_proj", "up_proj", "down_proj"}
    assert (first.asked, second.asked) == (4, 2)


def test_where_nobody_can_be_asked_what_is_known_of_names_decides() -> None:
    for proof in (proved(), proved(Silent())):
        assert leaves(proof) == {"gate_proj", "up_proj", "down_proj"}
    aria = {name.replace("gate_up_proj", "fc1").replace("down_proj", "fc2"): s for name, s in STACKS.items()}
    for proof in (proved(shapes=aria), proved(Silent(), shapes=aria)):
        assert leaves(proof) == {"gate_up_proj", "down_proj"}
    unknown = {name.replace("experts.gate_up_proj", "experts.mlp.gate_up_proj"): s for name, s in STACKS.items()}
    unknown = {name.replace("experts.down_proj", "experts.mlp.down_proj"): s for name, s in unknown.items()}
    for proof in (proved(shapes=unknown), proved(Silent(), shapes=unknown)):
        assert leaves(proof) == set()
        (reason,) = reasons(proof)
        assert "no reader could be asked" in reason
    assert leaves(proved(Fake("one", PROJ), shapes=unknown)) == {"gate_proj", "up_proj", "down_proj"}


def test_what_the_recipe_keeps_is_not_asked_about() -> None:
    reader = Fake("one")
    proof = proved(reader, recipe=Recipe(ignore=["*.experts.*"]))
    assert reasons(proof) == {"ignored by '*.experts.*'"}
    assert reader.asked == 1
