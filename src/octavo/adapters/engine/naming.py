"""Updates by other names than the checkpoint's: a trainer's, or of fused tensors. The model's loader is asked, dry.

What goes where the tensors of the checkpoint go is taken for them, so that it is quantized as they were. What the
loader has no use for is known as that; what it can't take is refused by its name and shape.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.header import TensorInfo
from ...elements.dry_run import Copy, Source, Trace, trace
from ...errors import CoverageError
from ...planning.plan import Plan
from .arrivals import Arrivals
from .expecting import Shape, likely_shapes
from .renaming import Part, parts_of
from .survey import error_text

#: names that are tried as those of other tensors, once one of them is understood, and turn out to be none
_MAX_MISSES = 8


class Names:
    """What a loader makes of names, asked while a model is given new weights.

    Args:
        plan: of what is read in this process.
        tensors: of the checkpoint.
        at_once: a context in which the loader writes what it is given, if otherwise it does so later.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[Iterable[tuple[str, Tensor]]], Any],
        plan: Plan,
        tensors: Mapping[str, TensorInfo],
        at_once: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model, self._load, self._at_once = model, load, at_once
        self._stacks = {placement.name: placement.pieces[0].src_name for placement in plan.placements}
        self._shapes = {name: info.shape for name, info in tensors.items()}  # other ranks' tensors, too
        self._shapes.update({placement.name: placement.shape for placement in plan.placements})
        self._counts = Counter(map(_numbered, tensors))
        self._known: dict[str, list[Copy]] = {}  # tensor of the checkpoint -> where it goes
        self._understood: dict[tuple[str, Shape], list[Part] | None] = {}  # empty: passed over
        self._targets: dict[tuple[str, Shape], list[str]] = {}

    def apart(self, name: str, weight: Tensor, arrivals: Arrivals[Any]) -> list[tuple[str, Tensor]] | None:
        """A tensor that the checkpoint does not know, as those that it holds; None if they are not whole.

        There are none where the loader passes over it.

        Raises:
            CoverageError: it can't be loaded, in this shape or at all.
        """
        key = (name, tuple(weight.shape))
        if key not in self._understood:
            self._ask_about_waiting(arrivals)
            self._ask(name, weight)
        parts = self._understood.get(key)
        if parts is None:
            return None
        weight = weight.contiguous()
        return [
            (part.name, weight.as_strided(part.shape, part.strides, weight.storage_offset() + part.offset))
            for part in parts
        ]

    def targets(self, name: str, weight: Tensor) -> list[str] | None:
        """Where a tensor goes that has been asked about; None if that can't be told without its numbers."""
        return self._targets.get((name, tuple(weight.shape)))

    def _ask_about_waiting(self, arrivals: Arrivals[Any]) -> None:
        """Where tensors of the checkpoint go, of layers that have their parameters in its form at the moment."""
        waiting = arrivals.waiting()
        names = [name for name in self._shapes if name in waiting and name not in self._known]
        if names:
            seen = self._trace({name: self._shapes[name] for name in names})
            if seen.failed is None:
                self._known.update(seen.by_source)

    def _ask(self, name: str, weight: Tensor) -> None:
        """About one, and, if it is a tensor of the checkpoint, about all whose names differ as its name does."""
        shape = tuple(weight.shape)
        seen = self._trace({name: shape})
        # what a tensor without data raises when it is asked for them says nothing of one that has some
        if seen.failed is not None and "meta" not in str(seen.failed[1]).lower():
            raise CoverageError(self._refusal(name, shape, seen.failed[1]))
        self._note(seen, {name: shape})
        parts = self._understood[name, shape]
        if parts is None and (expected := self._expected(name, shape)):
            raise CoverageError(self._other_shape(name, shape, expected))
        if parts is None or len(parts) != 1:
            return
        theirs, ours = _beginnings(name, parts[0].name)
        alike = {
            theirs + known.removeprefix(ours): self._shapes[known] for known in self._known if known.startswith(ours)
        }
        alike = {n: s for n, s in alike.items() if (n, s) not in self._understood and n not in self._shapes}
        for _ in range(_MAX_MISSES):
            seen = self._trace(alike)
            if seen.failed is None:
                self._note(seen, alike)
                return
            alike.pop(seen.failed[0], None)

    def _refusal(self, name: str, shape: Shape, error: Exception) -> str:
        if expected := self._expected(name, shape):
            return self._other_shape(name, shape, expected)
        return (
            f"{name}: is no tensor of the checkpoint, and {type(self._model).__name__} does not take it in the shape "
            f"{list(shape)} ({error_text(error)})"
        )

    def _other_shape(self, name: str, shape: Shape, expected: Shape) -> str:
        return f"{name}: has the shape {list(shape)}, and {type(self._model).__name__} takes it as {list(expected)}"

    def _expected(self, name: str, shape: Shape) -> Shape | None:
        """The shape in which the loader takes a tensor for others of the checkpoint."""
        for likely in likely_shapes(name, shape, self._shapes):
            self._note(self._trace({name: likely}), {name: likely})
            if self._understood[name, likely]:
                return likely
        return None

    def _note(self, seen: Trace, shapes: dict[str, tuple[int, ...]]) -> None:
        found = seen.by_source
        for name, shape in shapes.items():
            if seen.failed is None:
                self._targets[name, shape] = [copy.target for copy in found.get(name, ())]
            copies = found.get(name, [])
            if seen.failed is not None or name in seen.used or name in seen.opaque.values():
                self._understood[name, shape] = None
            else:
                self._understood[name, shape] = self._parts(copies, shape) if copies else []

    def _parts(self, copies: list[Copy], shape: Shape) -> list[Part] | None:
        return parts_of(copies, shape, self._known, self._shapes, self._count)

    def _count(self, name: str) -> int:
        """How many matrices are in the stack that a tensor is cut from; or how many there are that are called alike."""
        stack = self._stacks.get(name, name)
        shape = self._shapes[stack]
        return shape[0] if stack != name or len(shape) > 2 else self._counts[_numbered(name)]

    def _trace(self, shapes: dict[str, tuple[int, ...]]) -> Trace:
        with self._at_once():
            return trace(self._model, self._load, [Source(*each, torch.bfloat16) for each in shapes.items()])


def _numbered(name: str) -> str:
    """The name with a star in the place of its last number, which is that of an expert if it has one."""
    return re.sub(r"\d+(?=\D*$)", "*", name)


def _beginnings(theirs: str, ours: str) -> tuple[str, str]:
    """Two names without what they end in alike, whole words of it."""
    a, b = theirs.split("."), ours.split(".")
    while a and b and a[-1] == b[-1]:
        del a[-1], b[-1]
    return ("".join(f"{word}." for word in a), "".join(f"{word}." for word in b))
