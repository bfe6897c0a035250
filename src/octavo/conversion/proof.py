"""Proving a conversion before it is written: its readers' own code says what it would make of it.

A plan and a format say which tensors there will be, with which config. A `Reader` is given exactly that, without data,
and answers what its code would do with it. What it would misread without a word stays unquantized, and modules in which
it would wait for a scale that never comes are named to it as unquantized. Then it is asked again, until nothing is left
to say. What it refuses with an error stays as planned, since another reader may take it, and is noted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .. import choices
from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.declared import read_declared
from ..checkpoint.header import TensorInfo
from ..errors import CheckpointError, CoverageError
from ..numerics import schemes
from ..planning.plan import Plan, Veto
from ..planning.stacks import Cut
from ..streaming.meter import Stages
from ..text import human_bytes, some
from . import packing
from .formats import Format
from .unstacking import Unstacking

#: Readers settle in two rounds: names of modules in one, a proof in the next. After more they contradict themselves.
_ROUNDS = 6


#: what a judgement says by quantized tensor
_BY_NAME = ("misread", "modules", "refused")


@dataclass(frozen=True)
class Judgement:
    """What a reader would do with a checkpoint. Nothing but its name in it means that all is read right."""

    reader: str  # its name and version
    misread: Mapping[str, str] = field(default_factory=dict)  # quantized tensor -> what it would be taken for
    waiting: tuple[str, ...] = ()  # modules, by the reader's names, that want a scale which the checkpoint lacks
    modules: Mapping[str, str] = field(default_factory=dict)  # misread tensor -> the module that it is loaded into
    refused: Mapping[str, str] = field(default_factory=dict)  # quantized tensor -> the error that loading it raises
    missing: tuple[str, ...] = ()  # other parameters that nothing in the checkpoint makes
    unexpected: tuple[str, ...] = ()  # tensors for which the reader has no place, and which it misses not
    unproved: str = ""  # why the reader could not be asked
    caveats: tuple[str, ...] = ()  # options with which it reads something wrong
    contradictions: tuple[str, ...] = ()  # between config and headers, so that what is meant can't be told

    @property
    def ok(self) -> bool:
        """Whether all is read as it is meant."""
        wrong = self.misread or self.waiting or self.refused or self.missing or self.unexpected or self.contradictions
        return not (wrong or self.unproved)

    def renamed(self, names: Mapping[str, str]) -> Judgement:
        """The same of tensors by their names in a plan, which are not those on disk where weights are packed."""
        found = {key: {names.get(name, name): why for name, why in getattr(self, key).items()} for key in _BY_NAME}
        unexpected = tuple(names.get(name, name) for name in self.unexpected)
        return replace(
            self, misread=found["misread"], modules=found["modules"], refused=found["refused"], unexpected=unexpected
        )

    def lines(self) -> Iterator[str]:
        """What is wrong, a line each, and the verdict."""
        yield from (f"contradiction: {problem}" for problem in self.contradictions)
        for what, found in (("misread", self.misread), ("refused", self.refused)):
            yield from (f"{what}: {name}: {why}" for name, why in sorted(found.items()))
        yield from (
            f"waiting: {module}: it wants a scale there, and the checkpoint has none" for module in self.waiting
        )
        yield from (f"missing: nothing in the checkpoint makes {name}" for name in self.missing)
        yield from (f"unexpected: it has no place for {name}" for name in self.unexpected)
        yield from (f"note: {caveat}" for caveat in self.caveats)
        if self.unproved:
            yield f"NOT PROVED: {self.reader} could not be asked: {self.unproved}"
        else:
            yield f"{self.reader} reads all as it is meant" if self.ok else f"MISREAD by {self.reader}"


class Reader(Protocol):
    """Whoever loads converted checkpoints."""

    def judge(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        scales: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> Judgement:
        """Say what would become of ``tensors``.

        Args:
            checkpoint: the folder in which its other files lie.
            tensors: all tensors as they are, or will be, on disk.
            scales: quantized tensor -> its scale.
            config: config.json beside them.
        """
        ...


@dataclass(frozen=True)
class Absent:
    """A reader that can't be asked."""

    name: str
    why: str = "it is not installed"

    def judge(self, *_: Any) -> Judgement:
        return Judgement(self.name, unproved=self.why)


_NOBODY = Absent("any reader", "config.json names no architecture")
_NO_CONFIG = Absent("any reader", "there is no config.json, which would tell readers that the result is quantized")


@dataclass(frozen=True)
class Proof:
    """A plan that its readers agree with, and what they had to say."""

    plan: Plan
    quantization: Mapping[str, Any] | None  # config.json's quantization_config
    notes: tuple[str, ...] = ()
    asked: bool = False  # whether a reader could answer


def prove(
    checkpoint: Checkpoint,
    plan_with: Callable[[Veto, Sequence[Cut]], Plan],
    layout: Format,
    find_readers: Callable[[], Sequence[Reader]] | None,
    stages: Stages,
) -> Proof:
    """Plan a conversion so that every reader reads it right.

    Args:
        plan_with: makes the plan, given what must not be quantized, and stacks that are cut into matrices.
        find_readers: called once there is a plan, since finding them may take seconds. None: nobody is asked.

    Raises:
        CheckpointError: a reader that goes on contradicting what it said before.
        CoverageError: an index names tensors that no shard has, and a reader misses some.
    """
    unstacking = Unstacking(checkpoint)
    said = _Said()

    def veto(name: str, shape: tuple[int, ...], kind: str, scheme: str) -> str | None:
        if name in said.misread:
            return ": ".join(said.misread[name])
        return unstacking.veto(name, kind) or layout.veto(name, shape, kind, scheme)

    readers: Sequence[Reader] | None = None
    rounds = _ROUNDS
    while rounds:
        rounds -= 1
        with stages("plan"):
            plan = plan_with(veto, unstacking.cuts())
        quantization = layout.config(plan, said.waiting, said.modules) if plan.quantized else None
        judgements: list[Judgement] = []
        anew = False
        if quantization is not None and find_readers is not None:
            with stages("prove"):
                if readers is None:  # asking takes seconds, and without a class there is nothing to ask
                    nobody = _NOBODY if checkpoint.config else _NO_CONFIG
                    readers = find_readers() if checkpoint.config.get("architectures") else (nobody,)
                tensors, scales = as_written(checkpoint, plan, layout)
                names = {layout.weight_name(p): p.name for p in plan.quantized}
                config = {**checkpoint.config, "quantization_config": quantization}
                for reader in readers:
                    judgements.append(_ask(reader, checkpoint, tensors, scales, config).renamed(names))
                    if anew := unstacking.give_up(plan, judgements, complete=len(judgements) == len(readers)):
                        break
        if not anew and said.add(plan, judgements, unstacking.trying()):
            continue
        if anew or unstacking.settle(plan, judgements):
            said, rounds = _Said(), _ROUNDS  # of other tensors, readers may say other things
            continue
        _check_whole(checkpoint, judgements)
        if not judgements:
            return Proof(plan, quantization)
        asked = any(not judgement.unproved for judgement in judgements)
        notes = (*unstacking.notes(), *_notes(plan, judgements, said.misread))
        return Proof(plan, quantization, notes, asked)
    raise CheckpointError(
        f"{checkpoint.path}: {judgements[0].reader} could not be satisfied. Give --no-prove (prove=False) to write it "
        "as planned, and compare what your reader makes of it."
    )


def _check_whole(checkpoint: Checkpoint, judgements: Iterable[Judgement]) -> None:
    """Raise if what an index names, and no shard holds, is more than a leftover of the index."""
    for judgement in judgements if checkpoint.absent else ():
        if judgement.missing and not judgement.unproved:
            raise CoverageError(
                f"{checkpoint.path}: the index names tensors that no shard holds ({some(checkpoint.absent)}), and "
                f"{judgement.reader} finds none that makes {some(judgement.missing)}: the checkpoint is incomplete. "
                "Fetch it again."
            )


@dataclass
class _Said:
    """What readers have said so far."""

    misread: dict[str, tuple[str, str]] = field(default_factory=dict)  # tensor -> the reader, and why
    waiting: set[str] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)

    def add(self, plan: Plan, judgements: Iterable[Judgement], trying: Collection[str]) -> bool:
        """Add what they say of a plan; returns whether it was anything new, of other tensors than ``trying``."""
        news = False
        for judgement in judgements:
            mistaken = judgement.misread.keys() - trying
            news |= bool(mistaken) or not self.waiting.issuperset(judgement.waiting)
            self.waiting.update(judgement.waiting)
            # where there are several schemes, a module that has another name there may not have been found
            unnamed = judgement.modules.keys() - self.modules.keys() if len(plan.recipe.schemes) > 1 else set()
            self.modules.update({name: judgement.modules[name] for name in unnamed})
            for name in mistaken - unnamed:
                self.misread.setdefault(name, (judgement.reader, judgement.misread[name]))
        return news


def judge_written(checkpoint: Checkpoint, reader: Reader) -> Judgement:
    """What a reader would do with a checkpoint that is quantized already, whoever wrote it.

    Raises:
        CheckpointError: there is no FP8 in it and no int8 with scales, or no config.
    """
    tensors = checkpoint.tensors
    suffixes = {terms.scale_suffix for terms in choices.FORMATS.values()}

    def scale_of(name: str) -> str | None:
        plain = name.removesuffix(packing.PACKED)
        return next((plain + suffix for suffix in suffixes if plain + suffix in tensors), None)

    found = {name: scale_of(name) for name, info in tensors.items() if _holds_numbers(info)}
    for of_groups in [scale for scale in found.values() if scale is not None]:
        found.pop(of_groups, None)  # of FP8 themselves
    ignores = read_declared(checkpoint.folder, checkpoint.config, []).ignores  # where FP8 stands for itself
    alone = {name for name, scale in found.items() if scale is None}
    weights = [n for n in found if n not in alone or (tensors[n].dtype == schemes.FP8 and not ignores(n))]
    if not weights:
        raise CheckpointError(
            f"{checkpoint.path}: holds no tensors in float8_e4m3fn, and none in int8 with scales, which its readers "
            "could misread"
        )
    scales = {name: scale for name in weights if (scale := found[name]) is not None}
    judgement = _ask(reader, checkpoint, tensors, scales, checkpoint.config)
    wrong = {name: "it has no scale beside it" for name in weights if name in alone}
    others = tuple(said for said in checkpoint.contradictions if judgement.unproved or said.tensor not in wrong)
    judgement = replace(judgement, contradictions=others)
    return judgement if judgement.unproved else replace(judgement, misread={**judgement.misread, **wrong})


def _holds_numbers(info: TensorInfo) -> bool:
    """Return True if a tensor may be a quantized weight."""
    return info.dtype in schemes.NUMBERS or (info.name.endswith(packing.PACKED) and info.dtype in packing.DTYPES)


def as_written(checkpoint: Checkpoint, plan: Plan, layout: Format) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors that a conversion will write, and quantized tensor -> its scale."""
    tensors: dict[str, TensorInfo] = {}
    scales = {}
    for p in plan.placements:
        source = checkpoint.tensors[p.pieces[0].src_name]
        dtype_name, shape = layout.weight_type(p) if p.scheme else (p.dtype_name, source.shape)
        weight = layout.weight_name(p)
        tensors[weight] = TensorInfo(weight, dtype_name, shape, source.shard, 0, p.nbytes)
        for name, tensor in layout.beside(p).items():
            dtype_name = dtypes.NAMES[tensor.dtype]
            tensors[name] = TensorInfo(name, dtype_name, tuple(tensor.shape), source.shard, 0, tensor.nbytes)
        if p.scheme:
            scales[weight] = layout.scale_name(p.name)
            for name, (_, dtype_name, scale_shape) in layout.scales(p).items():
                nbytes = math.prod(scale_shape) * dtypes.BITS[dtype_name] // 8
                tensors[name] = TensorInfo(name, dtype_name, scale_shape, source.shard, 0, nbytes)
    return tensors, scales


def _ask(reader: Reader, *case: Any) -> Judgement:
    """A reader's judgement. One that can't give any is no reason not to convert, and is said."""
    try:
        return reader.judge(*case)
    except Exception as error:  # whatever its code raises on a model that it does not know
        return Judgement(type(reader).__name__, unproved=f"asking it failed: {type(error).__name__}: {error}")


def _notes(plan: Plan, judgements: Sequence[Judgement], misread: Mapping[str, tuple[str, str]]) -> list[str]:
    notes = []
    kept: dict[tuple[str, str], int] = {}
    for p in plan.kept:
        if p.name in misread:
            kept[misread[p.name]] = kept.get(misread[p.name], 0) + p.nbytes
    for (reader, why), nbytes in sorted(kept.items(), key=lambda item: -item[1]):
        notes.append(f"kept for {reader}, {human_bytes(nbytes)}: {why}")
    for judgement in judgements:
        if judgement.unproved:
            notes.append(f"not proved for {judgement.reader}: {judgement.unproved}")
        elif judgement.refused:
            name, why = next(iter(judgement.refused.items()))
            notes.append(
                f"{judgement.reader} can't load {len(judgement.refused):,} quantized tensors ({name} and others), and "
                f"says so: {why}. Choose another scheme or format if it is to."
            )
        elif judgement.waiting:
            notes.append(
                f"{judgement.reader} misreads it: it wants scales for {len(judgement.waiting):,} modules that have "
                f"none ({judgement.waiting[0]}), whatever config.json says. Choose another scheme or format if it is "
                "to read it."
            )
        elif judgement.missing or judgement.unexpected:
            names = (*judgement.unexpected, *judgement.missing)
            notes.append(
                f"{judgement.reader} reads what it takes as it is meant, but finds no place for "
                f"{len(judgement.unexpected):,} tensors, and misses {len(judgement.missing):,} ({names[0]}). Unless "
                "that is so of the source, too (octavo plan says what its model wants), it can't load the result: "
                "choose another scheme or format if it is to."
            )
        else:
            notes.append(f"proved: {judgement.reader} reads all that it takes as it is meant")
        notes += [f"{judgement.reader}: {caveat}" for caveat in judgement.caveats]
    return notes
