"""A survey of an engine's model: what becomes FP8, what stays and why. Dry runs decide it, before a byte is read.

The recipe says what should become FP8, the model has layers that hold FP8, and its loader says which tensors go there
and whether it takes their scales. Where the three agree, a tensor is quantized. Where an engine keeps a layer as it is,
so does octavo. Where the recipe keeps a tensor that goes into a layer of FP8, or where the loader can't take a weight
with its scale, the layer has to stay unquantized: `Survey.keep` names it, for the model to be made anew.

Coverage is exact: each element of each parameter is written once, by something that the checkpoint holds.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...checkpoint import dtypes
from ...conversion.formats import Format
from ...conversion.packing import PACKED
from ...elements.dry_run import Copy, Source, Trace, trace
from ...errors import CoverageError, RecipeError, raise_problems
from ...planning.plan import Plan
from .coverage import coverage, uncovered
from .culprits import Loader, trace_to_culprit
from .given import Given, given_for
from .placing import Places, split, write_facts
from .twins import twins

#: layer -> tensors, scales included, that fill it in this process -> its parameters that they go to
Fillers = Mapping[str, Mapping[str, frozenset[str]]]


@dataclass(frozen=True)
class Survey:
    """The outcome of the dry runs."""

    plan: Plan  # of what is to be read: in file order, without what the loader has no use for
    places: Places | None = None  # the same, in two parts; None where the model must be made anew
    layers: int = 0  # of the model that hold FP8
    unread: tuple[str, ...] = ()  # tensors that the loader passes over
    fillers: Fillers = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)  # modules that must stay unquantized after all -> why
    refused: Mapping[str, str] = field(default_factory=dict)  # of those: tensors that the loader can't take in FP8
    constants: tuple[Copy, ...] = ()  # what is filled with constants already: padding, and facts of weights


@dataclass(frozen=True)
class Surveyor:
    """Asks a model's loader about the checkpoint that ``plan`` was made for.

    Args:
        load: the model's own ``load_weights``.
        plan: of all tensors of the checkpoint, as the recipe would have them.
        layout: names and shapes of scales.
        exempt: parameters that no checkpoint needs to hold.
        replaced: after the loader has run, parameters that will give way to those of another model.
        kept: modules that an earlier survey wanted kept -> why.
        engine: what it is called.
    """

    model: nn.Module
    load: Loader
    plan: Plan
    layout: Format
    exempt: Collection[str] = ()
    replaced: Callable[[], Collection[str]] = tuple
    kept: Mapping[str, str] = field(default_factory=dict)
    engine: str = "the engine"

    def run(self) -> Survey:
        """Nearly always, what the recipe wants is what the engine does, and one dry run shows it; else it takes more.

        Raises:
            CoverageError: naming all that is missing, written twice or only in part, or that the loader refuses.
            RecipeError: only some of the tensors that the engine fuses are to be quantized.
        """
        wanted = frozenset(placement.name for placement in self.plan.quantized)
        seen = self._trace(wanted)
        reasons: dict[str, str] = {}
        if seen.failed or self._misfits(seen, wanted) or self._lacks_scale(seen, wanted):
            with twins(self.model, self._holders, self._given.each):
                plain, keep, lacking = self._plain()
                more, reasons = self._compare(plain, wanted)
                keep.update(more)
                wanted -= reasons.keys()
                seen, refused = self._try(wanted, lacking)
            for name, why in refused.items():
                for copy in plain.by_source.get(name, ()):
                    keep.setdefault(layer_of(copy.target), why)
            if keep:
                return Survey(self.plan, keep=keep, refused=refused)
        if repeated := self._repeated(seen):
            rest = tuple(placement for placement in self.plan.placements if placement.name not in repeated)
            found = dataclasses.replace(self, plan=dataclasses.replace(self.plan, placements=rest)).run()
            return dataclasses.replace(found, unread=(*found.unread, *sorted(repeated)))
        self._check_coverage(seen)
        hit = {self._origin(name) for name in seen.by_source.keys() | seen.used}
        layers = {layer_of(copy.target) for copy in seen.copies if copy.target in self._holders}
        unread = tuple(p.name for p in self.plan.placements if p.name not in hit)
        made = _amend(self.plan, hit, reasons)
        places, constants = split(self.model, seen, made, self.layout), [c for c in seen.copies if not c.sources]
        by_loader = {placement.name for placement in places.rest.placements}
        streamed = (placement for placement in made.quantized if placement.name not in by_loader)
        constants += write_facts(self.model, seen, self._given.facts(streamed))
        return Survey(made, places, len(layers), unread, _fillers(seen), constants=tuple(constants))

    def takes(self) -> bool | None:
        """Return True if the loader, given the plan's tensors alone, takes all in FP8; None if it passes over them."""
        wanted = frozenset(placement.name for placement in self.plan.quantized)
        seen = self._without_repeated_facts(trace(self.model, self.load, self._virtual(wanted, ())))
        if seen.failed is None and not seen.copies:
            return None
        if seen.failed or self._misfits(seen, wanted):
            return False
        memory = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return not any(uncovered(memory[name], copies) for name, copies in seen.by_target.items())

    def lands(self) -> set[str]:
        """The tensors of the plan, as they are, that the loader puts somewhere; all, where it fails."""
        seen = trace(self.model, self.load, self._virtual((), ()))
        return {*(self._names if seen.failed else seen.by_source)}

    # -- names --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _given(self) -> Given:
        return given_for(self.layout, self.plan.recipe.scheme)

    @functools.cached_property
    def _holders(self) -> set[str]:
        """Parameters that hold quantized numbers."""
        return self._given.holders(self.model)

    def _holds(self, copy: Copy) -> bool:
        """Return True if a copy of an unquantized tensor goes into a layer that holds quantized numbers."""
        return copy.target in self._holders or copy.target + PACKED in self._holders

    def _origin(self, name: str) -> str:
        """The weight that a tensor given to the loader is, or is the scale of."""
        weight = self._given.origin(name)
        return weight if weight in self._names else name

    @functools.cached_property
    def _names(self) -> set[str]:
        return {placement.name for placement in self.plan.placements}

    # -- dry runs -----------------------------------------------------------------------------------------------------

    def _trace(self, quantized: Collection[str], without: Collection[str] = ()) -> Trace:
        return self._without_repeated_facts(trace_to_culprit(self.model, self.load, self._virtual(quantized, without)))

    def _without_repeated_facts(self, seen: Trace) -> Trace:
        """Without what is written over: of matrices that an engine joins, each comes with its shape, for one place."""
        if self._facts:
            last = {
                (copy.target, copy.box): number
                for number, copy in enumerate(seen.copies)
                if not copy.sources.isdisjoint(self._facts)
            }
            seen.copies = [
                copy
                for number, copy in enumerate(seen.copies)
                if copy.sources.isdisjoint(self._facts) or last[copy.target, copy.box] == number
            ]
        return seen

    @functools.cached_property
    def _facts(self) -> Mapping[str, Tensor]:
        """What is known of quantized weights without reading them: name -> value."""
        return self._given.facts(self.plan.quantized)

    def _virtual(self, quantized: Collection[str], without: Collection[str]) -> Iterator[Source]:
        """The tensors that the loader is given when these become FP8; ``without`` those of some patterns."""
        for placement in self.plan.placements:
            name, shape = placement.name, placement.shape
            if without and pattern_of(name) in without:
                continue
            if name in quantized:
                yield from self._given.sources(placement)
            else:
                yield Source(name, shape, dtypes.MOVED[placement.source_dtype_names[0]])

    def _plain(self) -> tuple[Trace, dict[str, str], Collection[str]]:
        """A dry run of the checkpoint as it is; modules to keep that in FP8 lack a parameter; for which tensors."""
        lacking: dict[str, tuple[str, Exception]] = {}
        while (seen := self._trace(frozenset(), lacking.keys())).failed:
            culprit = pattern_of(seen.failed[0])
            if culprit in lacking:
                raise CoverageError(self._refusal(seen.failed))
            lacking[culprit] = seen.failed
        found, keep = seen.by_source, {}
        for failed in lacking.values():
            beside = [
                layer_of(copy.target)
                for name in self._names
                if pattern_of(layer_of(name)) == pattern_of(layer_of(failed[0]))
                for copy in found.get(name, ())
                if self._holds(copy)
            ]
            if not beside:
                raise CoverageError(self._refusal(failed))
            why = f"in FP8, {self.engine}'s layer has no place for {failed[0].rpartition('.')[2]}"
            keep.update(dict.fromkeys(beside, why))
        return seen, keep, lacking.keys()

    def _try(self, wanted: frozenset[str], without: Collection[str]) -> tuple[Trace, dict[str, str]]:
        """Dry runs until one passes, without what made others fail; and what can't be taken, with the reasons."""
        refused: dict[str, str] = {}
        while True:
            seen = self._trace(wanted - refused.keys(), without)
            if seen.failed is None:
                return seen, {**refused, **self._misfits(seen, wanted - refused.keys())}
            culprit = pattern_of(self._origin(seen.failed[0]))
            alike = [name for name in wanted - refused.keys() if pattern_of(name) == culprit]
            if not alike:
                raise CoverageError(self._refusal(seen.failed))
            why = f"{self.engine}'s loader does not take it with a scale ({text_of(seen.failed)})"
            refused.update(dict.fromkeys(alike, why))

    @property
    def _kept_by_engine(self) -> str:
        return f"{self.engine} keeps this layer unquantized"

    def _refusal(self, failed: tuple[str, Exception]) -> str:
        what = f"does not take the tensor {failed[0]!r}" if failed[0] else "fails to load"
        where = f"{self.plan.source}: {type(self.model).__name__} in {self.engine}"
        return f"{where} {what} ({text_of(failed)}). Nothing was read."

    # -- whether weights and scales fit -------------------------------------------------------------------------------

    def _lacks_scale(self, seen: Trace, wanted: Collection[str]) -> bool:
        """Return True if an unquantized tensor goes into a parameter that holds FP8, or is passed over for its name."""
        holders = self._holders
        if self._given.packed and not holders <= {copy.target for copy in seen.copies}:
            return True
        return any(c.target in holders and any(self._origin(n) not in wanted for n in c.sources) for c in seen.copies)

    def _misfits(self, seen: Trace, wanted: Iterable[str]) -> dict[str, str]:
        """Tensors in FP8 that don't arrive as they should -> why."""
        found, holders = seen.by_source, self._holders
        placements = {placement.name: placement for placement in self.plan.quantized}
        problems = {}
        for name in wanted:
            weights = found.get(self._given.weight(placements[name]), [])
            if not weights and not found.get(self.layout.scale_name(name)):
                continue  # the loader passes over it: another rank's experts, layers that the engine leaves out
            if not weights or any(copy.target not in holders for copy in weights):
                problems[name] = self._kept_by_engine
            elif why := self._given.misfit(placements[name], found, self.engine):
                problems[name] = why
        return problems

    def _compare(self, plain: Trace, wanted: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The recipe beside the model's layers: modules to keep -> why, and tensors to keep -> why."""
        found = plain.by_source
        keep: dict[str, str] = {}
        stay: dict[str, str] = {}
        homes: dict[str, set[str]] = {}
        for placement in self.plan.placements:
            copies = found.get(placement.name, [])
            inside = [layer_of(copy.target) for copy in copies if self._holds(copy)]
            for module in inside:
                homes.setdefault(module, set()).add(placement.name)
            if placement.name not in wanted:
                keep.update(dict.fromkeys(inside, placement.reason))
            elif len(inside) < len(copies):
                said = next((self.kept[m] for c in copies if (m := layer_of(c.target)) in self.kept), None)
                stay[placement.name] = why = said or self._kept_by_engine
                keep.update(dict.fromkeys(inside, why))
        ignored = {p.name: p.reason for p in self.plan.kept if p.reason.startswith("ignored by")}
        problems = []
        for module in keep:
            named = sorted(homes[module] & ignored.keys())
            others = sorted(homes[module] & set(wanted))
            if named and others:
                problems.append(
                    f"{named[0]} is {ignored[named[0]]}, but {self.engine} fuses it into {module} with {others[0]}, "
                    "which is to become FP8; ignore all of them, or none"
                )
        raise_problems(RecipeError, "recipe", problems)
        return keep, stay

    # -- coverage -----------------------------------------------------------------------------------------------------

    def _repeated(self, seen: Trace) -> set[str]:
        """Tensors that fill a parameter before another one does so again, where it does not matter which.

        A layer that drafts comes with copies of the model's embedding and head, by other names; stock loads one over
        the other, and takes the model's own in the end.
        """
        written, repeated = seen.by_target, set[str]()
        for name in self.replaced():
            copies = [copy for copy in written.get(name, ()) if copy.sources]
            if len({copy.box for copy in copies}) == 1:
                repeated.update(*(copy.sources for copy in copies if copy.sources != copies[-1].sources))
        return repeated

    def _check_coverage(self, seen: Trace) -> None:
        unneeded = {*self.exempt, *(name for name in self.replaced() if name not in seen.by_target)}
        advice = "Nothing was loaded. The checkpoint is incomplete, or not one of this model."
        raise_problems(CoverageError, self.plan.source, coverage(self.model, seen, self.plan, unneeded), advice)


def _fillers(seen: Trace) -> Fillers:
    found: dict[str, dict[str, set[str]]] = {}
    for copy in seen.copies:
        module, _, parameter = copy.target.rpartition(".")
        for source in copy.sources:
            found.setdefault(module, {}).setdefault(source, set()).add(parameter)
    return {module: {name: frozenset(to) for name, to in mine.items()} for module, mine in found.items()}


def _amend(plan: Plan, hit: Collection[str], reasons: Mapping[str, str]) -> Plan:
    """The plan of what is read: without what nobody takes; what can't be quantized stays, with the reason."""
    placements = []
    for placement in plan.placements:
        if placement.name not in hit:
            continue
        if placement.name in reasons:
            names = placement.source_dtype_names
            placement = dataclasses.replace(
                placement, dtype_name=names[0], scheme=None, parts=(), reason=reasons[placement.name]
            )
        placements.append(placement)
    return dataclasses.replace(plan, placements=tuple(placements))


def layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def pattern_of(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def text_of(failed: tuple[str, Exception]) -> str:
    return error_text(failed[1])


def error_text(error: Exception) -> str:
    """An error of others in a few words; an assertion without any is quoted, with its numbers."""
    return textwrap.shorten(whole_text(error), 160, placeholder=" ...")


def whole_text(error: Exception) -> str:
    """As `error_text`, with all words that it has."""
    said = str(error) or (_assertion(error) if isinstance(error, AssertionError) else "")
    return f"{type(error).__name__}: {said}".rstrip(": ")


def _assertion(error: AssertionError) -> str:
    """``assert heads % ranks == 0 (heads = 3, ranks = 2)``, as far as the source is at hand."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = traceback.extract_tb(error.__traceback__)
    line = found[-1].line if found else None
    try:
        test = ast.parse(line or "").body[0]
        names = [node for node in ast.walk(test) if isinstance(node, ast.Name | ast.Attribute)]
    except (SyntaxError, IndexError):
        return line or ""
    values = {ast.unparse(name): _value(name, frames[-1].f_locals) for name in names}
    numbers = ", ".join(f"{name} = {value}" for name, value in values.items() if isinstance(value, int))
    return f"{line} ({numbers})" if numbers else str(line)


def _value(name: ast.expr, variables: Mapping[str, Any]) -> Any:
    """What a name, or an attribute of one, stands for."""
    if isinstance(name, ast.Attribute):
        return getattr(_value(name.value, variables), name.attr, None)
    return variables.get(name.id) if isinstance(name, ast.Name) else None
