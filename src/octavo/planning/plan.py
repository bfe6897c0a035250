"""The plan: what each weight becomes, where each of its elements comes from, in which order bytes are read.

A plan is data: immutable, printable, JSON-able, made from headers and shapes alone, before any weight byte is read. It
checks that the pieces tile every parameter. `octavo.planning.chunks` cuts it into the units of reading;
`octavo.streaming.stream` executes those and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..choices import DEFAULT_STAGING_BYTES
from ..elements.boxes import coverage_problem
from ..elements.pieces import whole
from ..errors import CoverageError, DeviceError, RecipeError, raise_problems
from ..machine import on_cpu
from ..numerics import schemes
from ..numerics.schemes import Scheme
from ..text import human_bytes, pattern, printable, table_text
from . import kinds
from .budget import Budget, check_options
from .chunks import cut_placements
from .coded import lay_problems, requantized, settled
from .placement import Placement, Target, placement_of
from .recipe import Decision, Recipe, Weight
from .stacks import Cut


@dataclass(frozen=True)
class Plan:
    """Everything that a stream will do, decided before it begins. See `Plan.table` and `Plan.to_dict`.

    ``placements`` are in the order of reading. ``unused`` maps checkpoint tensors that nothing needs to the reason.
    """

    source: str
    recipe: Recipe
    placements: tuple[Placement, ...]
    unused: Mapping[str, str] = field(default_factory=dict)
    staging_bytes: int = DEFAULT_STAGING_BYTES
    other_bytes: Mapping[str, int] = field(default_factory=dict)  # device -> bytes not from the checkpoint (buffers)
    remarks: tuple[str, ...] = ()  # on the checkpoint

    def parts(self) -> list[Plan]:
        """The plan as streams execute it: what accelerators quantize, and what the host does."""
        apart: dict[bool, list[Placement]] = {}
        for placement in self.placements:
            apart.setdefault(placement.by_host, []).append(placement)
        return [replace(self, placements=tuple(found)) for _, found in sorted(apart.items())] or [self]

    # -- forecast -----------------------------------------------------------------------------------------------------

    @property
    def quantized(self) -> list[Placement]:
        return [placement for placement in self.placements if placement.scheme]

    @property
    def kept(self) -> list[Placement]:
        return [placement for placement in self.placements if not placement.scheme]

    @property
    def source_bytes(self) -> int:
        """Bytes of the same model without quantization, in the checkpoint's dtypes."""
        return sum(placement.source_bytes for placement in self.placements)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the same tensors in the files, scales aside: fewer where they are quantized already."""
        return sum(placement.stored_bytes for placement in self.placements)

    def final_bytes(self, device: str | None = None) -> int:
        """Bytes that stay, on one device or on all."""
        placed = sum(p.final_bytes for p in self.placements if device in (None, p.device))
        return placed + sum(n for d, n in self.other_bytes.items() if device in (None, d))

    def peak_bytes(self, device: str | None = None) -> int:
        """The most bytes that are ever held there while loading, with as many threads as this machine has cores."""
        try:
            budgets = [Budget.fit(part.placements, self.staging_bytes) for part in self.parts()]
        except DeviceError:  # what is sure is the budget
            return self.final_bytes(device) + self.staging_bytes
        if device is None:
            return self.final_bytes() + max(budget.staging_bytes for budget in budgets)
        on_host = on_cpu(device)
        return self.final_bytes(device) + max(b.host_bytes if on_host else b.device_bytes for b in budgets)

    @property
    def read_bytes(self) -> int:
        """Bytes that will be read: the sources, and a second time those whose scale groups span chunks."""
        return sum(
            chunk.nbytes
            for part in self.parts()
            for chunk in cut_placements(part.placements, Budget.fit(part.placements, self.staging_bytes).chunk_bytes)
        )

    @property
    def notes(self) -> list[str]:
        """Remarks for whoever made the plan."""
        idle = bool(self.recipe.schemes) and not self.quantized
        return [
            *self.remarks,
            *(["nothing is quantized: see what is kept, and why"] if idle else []),
            *requantized(self.placements),
        ]

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(p.device for p in self.placements), *self.other_bytes]))

    # -- presentation -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold; `Plan.diff` compares two of them."""
        return {
            "source": self.source,
            "recipe": self.recipe.to_dict(),
            "staging_bytes": self.staging_bytes,
            "source_bytes": self.source_bytes,
            "final_bytes": self.final_bytes(),
            "peak_bytes": self.peak_bytes(),
            "read_bytes": self.read_bytes,
            "devices": {
                d: {"final_bytes": self.final_bytes(d), "peak_bytes": self.peak_bytes(d)} for d in self.devices
            },
            "tensors": [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "from": list(p.sources),
                    "to": p.dtype_name,
                    "scheme": p.scheme,
                    "passed_through": p.passed,
                    "scale_shape": list(p.scale_shape) if p.scheme else None,
                    "reason": p.reason,
                    "bytes": p.final_bytes,
                    "device": p.device,
                    "pieces": len(p.pieces),
                }
                for p in self.placements
            ],
            "unused": dict(self.unused),
        }

    def diff(self, other: Plan) -> list[str]:
        """List the changes from this plan to ``other``, a line a tensor; the list is empty when they do the same."""
        mine = {p.name: p for p in self.placements}
        theirs = {p.name: p for p in other.placements}
        lines = [f"- {name}" for name in mine if name not in theirs]
        lines += [f"+ {name}" for name in theirs if name not in mine]
        for name in mine.keys() & theirs.keys():
            a, b = _summary(mine[name]), _summary(theirs[name])
            if a != b:
                lines.append(f"~ {name}: {a} -> {b}")
        return sorted(map(printable, lines), key=lambda line: line[2:])

    def table(self) -> str:
        """The plan for people: what becomes of each group of like tensors and why, and the memory forecast."""
        groups: dict[tuple[str, ...], list[Placement]] = {}
        for p in self.placements:
            sources = "+".join(dtypes.short(d) if (d := dtypes.TORCH.get(n)) else n for n in p.sources)
            to = p.scheme or dtypes.short(p.dtype)
            key = (pattern(p.name), "x".join(map(str, p.shape)) or "scalar", sources, to, p.reason)
            groups.setdefault(key, []).append(p)
        columns = dict.fromkeys(("tensors", "shape", "from", "to", "why"), "left")
        rows = [
            (*labels, str(len(members)), human_bytes(sum(p.final_bytes for p in members)))
            for labels, members in groups.items()
        ]
        lines = [table_text(self.source, {**columns, "count": "right", "final": "right"}, rows)]
        for name, why in list(self.unused.items())[:10]:
            lines.append(printable(f"not used: {name}: {why}"))
        lines += [printable(f"note: {note}") for note in self.notes]
        if len(self.devices) > 1:
            lines += [
                f"{d}: final {human_bytes(self.final_bytes(d))}, peak at most {human_bytes(self.peak_bytes(d))}"
                for d in self.devices
            ]
        lines.append(
            f"unquantized {human_bytes(self.source_bytes)}, final {human_bytes(self.final_bytes())}, "
            f"peak at most {human_bytes(self.peak_bytes())}, to read {human_bytes(self.read_bytes)}"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _summary(placement: Placement) -> str:
    parts = f" in {len(placement.parts)} parts" if len(placement.parts) > 1 else ""
    device = f" on {placement.device}" if placement.device != "cpu" else ""
    return f"{placement.scheme or placement.dtype_name} {list(placement.shape)}{parts}{device}"


# -- making a plan ----------------------------------------------------------------------------------------------------


#: (name, shape, kind, scheme) -> why whoever reads the result could not take that, or None
Veto = Callable[[str, tuple[int, ...], str, str], str | None]


def plan_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    device: str = "cpu",
    veto: Veto | None = None,
    cuts: Iterable[Cut] = (),
) -> Plan:
    """The plan that keeps the checkpoint's own names and shapes, but for stacks that are cut: see `make_plan`."""
    targets = []
    for info in checkpoint.tensors.values():
        shape, kind = info.shape, kinds.kind_by_name(info, checkpoint.config, checkpoint.tensors)
        dtype = dtypes.TORCH[info.dtype_name]
        if dtype is None:
            shape, kind = (info.nbytes,), f"{info.dtype_name}, carried as bytes"
        targets.append(Target(info.name, shape, dtype, kind, (whole(info.name, shape),), device))
    plan = make_plan(checkpoint, targets, recipe, staging_bytes, veto=veto, cuts=cuts)
    return replace(plan, remarks=(*plan.remarks, *_left_quantized(checkpoint, recipe)))


def check_unquantized(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raise if weights are to be quantized that are quantized already."""
    if recipe.schemes and (found := checkpoint.quantization) is not None:
        raise RecipeError(
            f"{checkpoint.path}: already quantized ({found}){found.why}; quantizing twice loses accuracy. "
            f"{found.advice}"
        )


def check_no_codes(checkpoint: Checkpoint) -> None:
    """Raise if tensors that are handed out as they are would be codes, which nothing beside them says."""
    found = checkpoint.quantization
    if found is not None and not found.doubted:
        raise RecipeError(
            f"{checkpoint.path}: already quantized ({found}){found.why}: codes would be handed out as if they were "
            f"weights. {found.advice}"
        )


def make_plan(
    checkpoint: Checkpoint,
    targets: Iterable[Target],
    recipe: Recipe,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    *,
    unused: Mapping[str, str] | None = None,
    other_bytes: Mapping[str, int] | None = None,
    veto: Veto | None = None,
    cuts: Iterable[Cut] = (),
    covered: bool = False,
) -> Plan:
    """Decide about every target, check coverage, and put the targets in the order in which the files hold them.

    Args:
        cuts: stacks of experts that are cut into matrices, if all of them are quantized, and by the same scheme.
        covered: coverage has been checked already.

    Raises:
        RecipeError: the recipe is ambiguous here, can't be honoured, or the checkpoint is quantized already.
        CoverageError: some target is not tiled by its pieces; all of them are named.
    """
    check_unquantized(checkpoint, recipe)
    check_options(staging_bytes)
    targets = list(targets)
    infos = checkpoint.tensors
    recipe, settled_on = settled(recipe, infos.values())
    problems = []
    for target in targets:
        problem = None if covered else coverage_problem(target.shape, target.pieces)
        if problem:
            problems.append(f"{target.name} {list(target.shape)}: {problem}")
        if checkpoint.source is not None:
            problems += lay_problems(target.name, target.pieces, infos)
    raise_problems(CoverageError, checkpoint.path, problems)

    weights = []
    for target in targets:
        sources = tuple(dict.fromkeys(piece.src_name for piece in target.pieces))
        source_dtypes = {dtypes.TORCH[infos[name].dtype_name] for name in sources}
        # of mixed sources, one that is no float makes the parameter unquantizable
        odd = [dtype for dtype in source_dtypes if dtype not in dtypes.QUANTIZABLE]
        dtype = odd[0] if odd else next(iter(source_dtypes), target.dtype)
        kind = target.kind if math.prod(target.shape) else "empty"
        weights.append(Weight(target.name, sources, dtype, kind, target.keep))
    decisions = recipe.decide(weights)
    targets = _cut(targets, decisions, cuts, veto)
    for target in targets:
        scheme = decisions[target.name].scheme
        why = _unfit(target, schemes.get(scheme)) if scheme else None
        why = why or (veto(target.name, target.shape, target.kind, scheme) if veto and scheme else None)
        if why:
            decisions[target.name] = Decision(None, why)

    placements = [placement_of(target, decisions[target.name], infos) for target in targets]
    first = {
        p.name: min(((infos[q.src_name].shard, infos[q.src_name].offset) for q in p.pieces), default=(0, 0))
        for p in placements
    }
    placements.sort(key=lambda p: first[p.name])
    return Plan(
        str(checkpoint.path),
        recipe,
        tuple(placements),
        {**checkpoint.left_out, **(unused or {})},
        staging_bytes,
        dict(other_bytes or {}),
        (*checkpoint.notes, *filter(None, [settled_on])),
    )


def _unfit(target: Target, scheme: Scheme) -> str | None:
    """Why a target can't be quantized by a scheme; None if it can."""
    shape, pieces = target.apart or (target.shape, target.pieces)
    axis = len(shape) - (2 if target.transposed else 1)
    bounds = [shape[axis], *(at for piece in pieces for at in (piece.dst_off[axis], piece.dst_end[axis]))]
    return next((f"{scheme.name}: {why}" for at in bounds if (why := scheme.unfit(at))), None)


def _left_quantized(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[str]:
    """A remark on what is copied as it is, where it might be thought to become bf16."""
    if not recipe.schemes and (found := checkpoint.quantization) is not None:
        yield f"already quantized ({found}){found.why}: all tensors stay as they are"


def _cut(targets: list[Target], decisions: dict[str, Decision], cuts: Iterable[Cut], veto: Veto | None) -> list[Target]:
    """The targets with matrices in the place of stacks, and decisions about them."""
    made: dict[str, Sequence[Target]] = {}
    for cut in cuts:
        found = {decisions[name].scheme for name in cut}
        scheme = found.pop() if len(found) == 1 else None
        if scheme is None:
            continue
        matrices = [(name, matrix) for name, found in cut.items() for matrix in found]
        vetoes = (veto(m.name, m.shape, m.kind, scheme) for _, m in matrices) if veto else iter(())
        if why := next(filter(None, vetoes), None):
            decisions.update({name: Decision(None, f"expert stack: {why}") for name in cut})
            continue
        made.update(cut)
        decisions.update({matrix.name: decisions[name] for name, matrix in matrices})
    return [_on(matrix, target.device) for target in targets for matrix in made.get(target.name, (target,))]


def _on(target: Target, device: str) -> Target:
    """The target there, where a stack goes that it is of."""
    return target if target.device == device else replace(target, device=device)
