"""What an engine would make of a checkpoint, rank by rank: figures, a table, JSON. Needs no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ...checkpoint import dtypes
from ...planning.budget import Budget
from ...planning.placement import Placement
from ...streaming.sinks import Memory
from ...text import count_text, human_bytes, pattern, printable, table_text
from .survey import Survey

_MAX_UNREAD = 2


@dataclass(frozen=True)
class Weight:
    """A parameter, or what one tensor fills of it, as a rank has it."""

    name: str
    to: str  # its scheme, or its dtype
    quantized: bool
    why: str  # what it is, or why it stays
    nbytes: int  # with its scale
    tensors: int  # of the checkpoint that it is made of
    computed: bool  # by the engine's own loader, which is given the whole tensors

    @classmethod
    def of(cls, placement: Placement, computed: bool = False, held: Memory | None = None) -> Weight:
        name, to = placement.name.partition(" (")[0], placement.scheme or dtypes.short(placement.dtype)
        tensors, quantized = len({piece.src_name for piece in placement.pieces}), placement.scheme is not None
        nbytes = placement.final_bytes  # but engines hold scales in dtypes of their own
        if held is not None:
            nbytes = sum(tensor.nbytes for tensor in held.tensors if tensor is not None)
        return cls(name, to, quantized, placement.reason, nbytes, tensors, computed)


@dataclass(frozen=True)
class Rank:
    """One rank: what is read for it, what it holds, and the most that it holds while it loads, in bytes."""

    rank: int
    model: str
    read_bytes: int
    final_bytes: int
    peak_bytes: int
    weights: tuple[Weight, ...]
    unread: tuple[str, ...]  # tensors that its loader passes over
    derived: Mapping[str, int] = field(default_factory=dict)  # layers -> bytes that they make of weights, and keep
    beside_bytes: int = 0  # of buffers, of rows that pad, of whatever else no tensor fills

    @classmethod
    def of(cls, rank: int, model: nn.Module, found: Survey, device: str, derived: Mapping[str, int]) -> Rank:
        """The figures of a survey, in which the model may have been on meta, for where it is to be."""
        assert found.places is not None
        there, rest = found.places.direct.placements, found.places.rest
        direct = replace(found.places.direct, placements=tuple(replace(p, device=device) for p in there))
        held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
        loaded_bytes, beside = sum(held.values()), Budget.fit(direct.placements, direct.staging_bytes).staging_bytes
        if rest.placements:  # of which each tensor is made whole
            beside = max(beside, rest.staging_bytes, *(placement.final_bytes for placement in rest.placements))
        storages = found.places.storages
        weights = (
            *(Weight.of(p, held=storages[p.name]) for p in there),
            *(Weight.of(placement, True) for placement in rest.placements),
        )
        final_bytes = loaded_bytes + sum(derived.values())  # made when staging has been given back
        return cls(
            rank,
            type(model).__name__,
            direct.read_bytes + replace(rest, placements=_moved(rest.placements, device)).read_bytes,
            final_bytes,
            max(final_bytes, loaded_bytes + beside),
            weights,
            found.unread,
            derived,
            max(0, loaded_bytes - sum(weight.nbytes for weight in weights)),
        )

    def grouped(self, quantized: bool) -> dict[str, tuple[int, int]]:
        """Scheme, or the reason for none -> tensors of the checkpoint, bytes here; most bytes first."""
        groups: dict[str, tuple[int, int]] = {}
        for weight in self.weights:
            if weight.quantized == quantized:
                key = weight.to if quantized else weight.why
                count, nbytes = groups.get(key, (0, 0))
                groups[key] = count + weight.tensors, nbytes + weight.nbytes
        return dict(sorted(groups.items(), key=lambda group: -group[1][1]))


def _moved(placements: Sequence[Placement], device: str) -> tuple[Placement, ...]:
    return tuple(replace(placement, device=device) for placement in placements)


def shared_notes(each: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The notes of all ranks: once what all of them have, else with the rank."""
    said = dict.fromkeys(note for notes in each for note in notes)
    common = [note for note in said if all(note in notes for notes in each)]
    own = [f"rank {rank}: {note}" for rank, notes in enumerate(each) for note in notes if note not in common]
    return (*common, *own)


@dataclass(frozen=True)
class Forecast:
    """All ranks."""

    engine: str  # with its version
    source: str
    scheme: str
    ranks: tuple[Rank, ...]
    notes: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        return max(rank.peak_bytes for rank in self.ranks)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Forecast:
        """What `dataclasses.asdict` made, from JSON."""
        ranks = []
        for rank in fields["ranks"]:
            weights = tuple(Weight(**weight) for weight in rank["weights"])
            ranks.append(Rank(**{**rank, "weights": weights, "unread": tuple(rank["unread"])}))
        notes = tuple(fields.get("notes", ()))
        return cls(fields["engine"], fields["source"], fields["scheme"], tuple(ranks), notes)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        result = asdict(self)
        for rank, made in zip(self.ranks, result["ranks"], strict=True):
            for key, quantized in (("quantized", True), ("kept", False)):
                made[key] = {name: {"tensors": n, "bytes": b} for name, (n, b) in rank.grouped(quantized).items()}
        return result

    def table(self) -> str:
        """For people: what becomes of each group of like weights, with the bytes of each rank; the ranks' sums."""
        groups: dict[tuple[str, str, str], list[list[Weight]]] = {}
        for number, rank in enumerate(self.ranks):
            for weight in rank.weights:
                why = f"{weight.why}{', through its own loader' * weight.computed}"
                key = (pattern(weight.name), weight.to, why)
                groups.setdefault(key, [[] for _ in self.ranks])[number].append(weight)
        columns = {**dict.fromkeys(("weights", "to", "why"), "left"), "count": "right"}
        columns |= {f"rank {rank.rank}": "right" for rank in self.ranks}
        rows = [
            (*key, str(max(map(len, each))), *(human_bytes(sum(w.nbytes for w in mine)) for mine in each))
            for key, each in groups.items()
        ]
        title = f"{self.source}: {self.ranks[0].model} in {self.engine}"
        notes = [printable(f"note: {note}") for note in self.notes]
        sums = [line for rank in self.ranks for line in self._sums(rank)]
        return "\n".join([table_text(title, columns, rows), *sums, *notes])

    def _sums(self, rank: Rank) -> list[str]:
        one = f"rank {rank.rank}: " if len(self.ranks) > 1 else ""
        parts = [f"{count_text(found)} to {scheme}" for scheme, found in rank.grouped(True).items()]
        parts += [f"{count_text(found)} kept: {why}" for why, found in rank.grouped(False).items()]
        lines = [f"{one}{part}" for part in parts or ["nothing"]]
        if rank.unread:
            more = ", ..." if len(rank.unread) > _MAX_UNREAD else ""
            lines.append(f"{one}not read: {len(rank.unread):,} ({', '.join(rank.unread[:_MAX_UNREAD])}{more})")
        if rank.beside_bytes:
            lines.append(f"{one}filled by no tensor (buffers, rows that pad): {human_bytes(rank.beside_bytes)}")
        lines += [
            f"{one}made of weights after loading, by {name}: {human_bytes(n)}" for name, n in rank.derived.items()
        ]
        lines.append(
            f"{one}to read {human_bytes(rank.read_bytes)}, final {human_bytes(rank.final_bytes)}, "
            f"peak at most {human_bytes(rank.peak_bytes)}"
        )
        return [printable(line) for line in lines]
