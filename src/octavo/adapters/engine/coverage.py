"""Whether an engine's loader fills each parameter of a model once, with what it may hold. Imports no engine."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from ...checkpoint import dtypes
from ...elements.boxes import coverage_problem
from ...elements.dry_run import Copy, Trace
from ...planning.plan import Plan
from ...text import pattern

#: the shape of a parameter, and a name without its numbers
_Kind = tuple[torch.Size, str]


def coverage(model: nn.Module, seen: Trace, plan: Plan, unneeded: Collection[str]) -> list[str]:
    """What is wrong with parameters of a model, by what a dry run of the plan's tensors has shown.

    Args:
        unneeded: parameters to which nothing has to go.
    """
    written = seen.by_target
    dtype_names = {placement.name: placement.source_dtype_names[0] for placement in plan.placements}
    # which an engine would take for weights, number by number: integers, and FP8 without a scale
    no_floats = {name for name, dtype in dtype_names.items() if dtypes.TORCH[dtype] not in dtypes.QUANTIZABLE}
    alike = _Alike(model, seen, plan)
    problems = []
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or name in unneeded:
            continue
        copies = written.get(name, [])
        problem = None
        if name in seen.opaque:
            problem = f"{seen.opaque[name]} goes into it in a way that can't be followed"
        elif not copies:
            problem = "comes from no tensor of the checkpoint"
        elif parameter.is_floating_point() and (
            odd := [c.src_name for c in copies if not c.sources.isdisjoint(no_floats)]
        ):
            problem = f"{odd[0]} goes there, which is {dtype_names[odd[0]]}: no bf16, fp16 or fp32"
        elif len(copies) > 1 or copies[0].box.size != tuple(parameter.shape):
            problem = uncovered(parameter, copies) or alike.short(parameter, copies)
        problem = problem or alike.long(parameter, copies)
        if problem:
            problems.append(f"{name} {list(parameter.shape)}: {problem}")
    return problems


class _Alike:
    """Tensors whose names differ in numbers alone, and that go to parameters of one shape: they have one shape, too.

    Where a loader pads what is too small, or takes of what is too large as much as it needs, nothing else tells a size
    of which all of a model is from one that is wrong.
    """

    def __init__(self, model: nn.Module, seen: Trace, plan: Plan) -> None:
        self._model, self._seen = model, seen
        self._shapes = {placement.name: placement.shape for placement in plan.placements}

    def short(self, parameter: Tensor, copies: Sequence[Copy]) -> str | None:
        """Say which of the tensors that fill a parameter is smaller than others of its kind, or None."""
        if all(copy.sources for copy in copies):
            return None
        for name in sorted({copy.src_name for copy in copies if copy.sources}):
            if pattern(name) == name or name not in self._shapes:
                continue
            largest = self._largest[self._kind(parameter, name)]
            if self._shapes[name] != self._shapes[largest]:
                return f"{name} has the shape {self._beside(name, largest)}: constants would fill the rest"
        return None

    def long(self, parameter: Tensor, copies: Sequence[Copy]) -> str | None:
        """Say which of the tensors that fill a parameter is larger than most of its kind, and only begun; or None."""
        for name in sorted({copy.src_name for copy in copies} & self._shapes.keys() if self._usual else ()):
            usual = self._usual.get(self._kind(parameter, name))
            if usual is None or self._size(name) <= self._size(usual):
                continue
            taken = sum(math.prod(copy.box.size) for copy in copies if name in copy.sources)
            if taken < self._size(name):
                return f"{name} has the shape {self._beside(name, usual)}: the rest would be left out"
        return None

    def _beside(self, name: str, other: str) -> str:
        return f"{list(self._shapes[name])}, where {other} has {list(self._shapes[other])}"

    def _size(self, name: str) -> int:
        return math.prod(self._shapes[name])

    @functools.cached_property
    def _largest(self) -> dict[_Kind, str]:
        return {kind: max(alike, key=self._size) for kind, alike in self._alike.items()}

    @functools.cached_property
    def _usual(self) -> dict[_Kind, str]:
        """Of kinds of several shapes, a tensor that has the shape of most; of several such shapes the smallest."""
        found = {}
        for kind, alike in self._alike.items():
            counts = Counter(self._shapes[name] for name in alike)
            if len(counts) > 1:
                found[kind] = min(alike, key=lambda name: (-counts[self._shapes[name]], self._size(name), name))
        return found

    @functools.cached_property
    def _alike(self) -> dict[_Kind, dict[str, None]]:
        """The tensors of each kind, in order."""
        parameters, found = dict(self._model.named_parameters()), dict[_Kind, dict[str, None]]()
        for copy in self._seen.copies:
            if copy.target in parameters and (name := copy.src_name) in self._shapes:
                found.setdefault(self._kind(parameters[copy.target], name), {})[name] = None
        return found

    @staticmethod
    def _kind(parameter: Tensor, name: str) -> _Kind:
        return parameter.shape, pattern(name)


def uncovered(parameter: Tensor, copies: Sequence[Copy]) -> str | None:
    """Say why the copies don't tile a parameter, or None. Constants fill the padding, or what is written later."""
    from_checkpoint = [copy for copy in copies if copy.sources]
    problem = coverage_problem(parameter.shape, from_checkpoint)
    if problem and len(from_checkpoint) < len(copies):
        constants = [copy for copy in copies if not copy.sources]
        problem = coverage_problem(parameter.shape, [*from_checkpoint, *constants])
    if problem and "come from no" in problem:
        names = sorted({copy.src_name for copy in from_checkpoint})
        problem = f"only {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} {_go(names)} there; {problem}"
    return problem


def _go(names: Sequence[str]) -> str:
    return "goes" if len(names) == 1 else "go"


def parameters_of(method: type, model: nn.Module) -> set[str]:
    """Of layers whose quantization method is of this class of the engine's."""
    return {
        f"{name}.{parameter}"
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), method)
        for parameter, _ in layer.named_parameters()
    }
