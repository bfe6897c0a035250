"""Stacks of experts, as readers want them: matrices under the names that they take in FP8, or the stack as it is.

What readers call an expert's matrices differs, and some take none. So they are asked, with one naming after another,
until one is found that all of them read right. Where there is none, the one counts that some reader reads right and no
other would misread without a word; where there is none of these either, the stacks stay. Where nobody can be asked,
only the stacks are cut of which it is known that stock readers take their matrices.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..planning.kinds import EXPERTS
from ..planning.plan import Plan
from ..planning.stacks import Cut, Series, find_series
from ..text import human_bytes
from .formats import STACK, known_naming

if TYPE_CHECKING:
    from .proof import Judgement

#: characters of a reader's error that are shown as the reason for which a stack stays
_MOST_WORDS = 160


@dataclass
class _Verdict:
    """What readers say of one naming."""

    right: list[str] = field(default_factory=list)  # readers that read it as it is meant
    wrong: dict[str, str] = field(default_factory=dict)  # reader -> why it does not
    silent: bool = False  # whether one of these would not say so


@dataclass
class _Alike:
    """Experts that are alike, and what was said of them."""

    experts: Series
    settled: bool = False
    verdicts: dict[int, _Verdict] = field(default_factory=dict)  # naming -> what was said

    @property
    def naming(self) -> int | None:
        return self.experts.naming

    def settle(self, naming: int | None) -> None:
        self.experts.naming, self.settled = naming, True

    def useful(self) -> dict[int, _Verdict]:
        """Namings by which one reader reads all right, and no other misreads anything without a word."""
        return {naming: verdict for naming, verdict in self.verdicts.items() if verdict.right and not verdict.silent}


class Unstacking:
    """Which stacks of a checkpoint are cut, and by which names: `cuts`, while readers are asked about them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._series = [_Alike(experts) for experts in find_series(checkpoint)]
        self._why: dict[str, str] = {}  # stack -> why it stays one

    def cuts(self) -> list[Cut]:
        return [cut for series in self._series for cut in series.experts.cuts()]

    def veto(self, name: str, kind: str) -> str | None:
        """Why a stack stays one, if readers had a say in that."""
        return self._why.get(name) if kind == EXPERTS else None

    def trying(self) -> set[str]:
        """Matrices under names that are not settled: what is said of them is no reason to keep them unquantized."""
        return {name for series in self._unsettled() for name in series.experts.names()}

    def give_up(self, plan: Plan, judgements: Sequence[Judgement], *, complete: bool) -> bool:
        """Leave names that are of no use, whatever else is to be said; returns whether there are others now.

        These are names that no reader takes; and where one reads others already, those that the next one does not take.

        Args:
            complete: all readers have been asked.
        """
        changed = False
        for series, names in self._written(plan):
            asked = [j for j in judgements if not j.unproved or not names.isdisjoint(j.unexpected)]
            against = [j for j in asked if not names.isdisjoint({*j.misread, *j.unexpected})]
            if against and (series.useful() or (complete and len(against) == len(asked))):
                self._hear(series, names, judgements)
                self._next(series)
                changed = True
        return changed

    def settle(self, plan: Plan, judgements: Sequence[Judgement]) -> bool:
        """Take in what readers say who have nothing else to say; returns whether it is other names, or none, now."""
        changed = False
        for series, names in self._written(plan):
            verdict = self._hear(series, names, judgements)
            if verdict.wrong:
                before = series.naming
                self._next(series)
                changed |= series.naming != before
            elif verdict.right or series.naming == known_naming(series.experts.layers[0]):
                series.settled = True
            elif known_naming(series.experts.layers[0]) is not None:
                series.settle(known_naming(series.experts.layers[0]))
                changed = True
            else:
                self._stay(series, "no reader could be asked what it calls matrices of it")
                changed = True
        return changed

    def _unsettled(self) -> list[_Alike]:
        return [series for series in self._series if not series.settled]

    def _written(self, plan: Plan) -> Iterator[tuple[_Alike, set[str]]]:
        """What is not settled, with the matrices that are to be written."""
        written = {placement.name for placement in plan.quantized} if self._unsettled() else set()
        for series in self._unsettled():
            names = series.experts.names() & written
            if names:  # else the recipe or the format keeps them
                yield series, names

    def _hear(self, series: _Alike, names: set[str], judgements: Sequence[Judgement]) -> _Verdict:
        assert series.naming is not None
        verdict = series.verdicts[series.naming] = _verdict(names, judgements)
        return verdict

    def _next(self, series: _Alike) -> None:
        """The next naming; after the last one, what is best."""
        if series.experts.next():
            return
        if useful := series.useful():
            series.settle(max(useful, key=lambda n: (len(useful[n].right), -n)))
            return
        reader, why = next(said for verdict in series.verdicts.values() for said in verdict.wrong.items())
        self._stay(series, f"{reader} takes none of its matrices ({why})")

    def _stay(self, series: _Alike, why: str) -> None:
        reason = f"{STACK}, and {why}"
        self._why.update({info.name: reason for layer in series.experts.layers for info in layer.stacks.values()})
        series.settle(None)

    def notes(self) -> list[str]:
        """Which readers do without experts that are cut for others, and what it costs where none are."""
        notes: dict[str, None] = {}
        kept: dict[str, int] = {}
        for series in self._series:
            said = {reader for verdict in series.verdicts.values() for reader in verdict.wrong}
            if series.naming is None and said:
                reader = " and ".join(sorted(said))
                nbytes = sum(info.nbytes for layer in series.experts.layers for info in layer.stacks.values())
                kept[reader] = kept.get(reader, 0) + nbytes
            verdict = None if series.naming is None else series.verdicts.get(series.naming)
            for reader, why in verdict.wrong.items() if verdict else ():
                served = " and ".join(verdict.right) if verdict else ""
                notes[f"stacks of experts are matrices for {served}, which {reader} can't load: {why}"] = None
        costs = [
            f"stacks of experts stay unquantized, {human_bytes(nbytes)}, for {reader}; if another one is to read the "
            "result, name it: reader=..., --reader"
            for reader, nbytes in kept.items()
        ]
        return [*notes, *costs]


def _verdict(names: set[str], judgements: Sequence[Judgement]) -> _Verdict:
    verdict = _Verdict()
    for judgement in judgements:
        homeless: Mapping[str, str] = dict.fromkeys(names & {*judgement.unexpected}, "it has no place for them")
        said = (judgement.misread, judgement.refused, homeless)
        why = next((found[min(bad)] for found in said if (bad := names & found.keys())), None)
        if why is not None:
            verdict.wrong[judgement.reader] = textwrap.shorten(why, _MOST_WORDS, placeholder=" ...")
            verdict.silent |= not names.isdisjoint(judgement.misread)
        elif not judgement.unproved:
            verdict.right.append(judgement.reader)
    return verdict


__all__ = ["Unstacking"]
