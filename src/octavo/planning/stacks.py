"""Stacks of experts, cut into the matrices that readers take in FP8: one tensor an expert and projection.

A file may hold all experts of a layer in one 3-D tensor, or two: gate and up fused, and down. Which axis is which is
told by the shapes of both. Nothing is moved: a matrix is a target whose one piece is a strided view of the stack. Its
axes are [out, in] whatever those of the stack are, so it is quantized as any other matrix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, contiguous_strides
from . import kinds
from .placement import Target

#: A stack -> the matrices that it becomes. All stacks of a layer's experts are cut, or none of them.
Cut = Mapping[str, Sequence[Target]]

#: what a stack holds, by the last component of its name
_ROLES = {
    **dict.fromkeys(("gate_up_proj", "input_linear", "fc1"), "gate_up"),
    **dict.fromkeys(("gate_proj", "w1"), "gate"),
    **dict.fromkeys(("up_proj", "w3"), "up"),
    **dict.fromkeys(("down_proj", "output_linear", "fc2", "w2"), "down"),
}
#: what readers may call the matrices of an expert, the most common first
NAMINGS: tuple[Mapping[str, str], ...] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
)
#: more experts than any model has: each becomes three tensors
_MAX_EXPERTS = 1 << 12


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, in stacks."""

    base: str  # what comes before an expert's number in the names of its matrices
    stacks: Mapping[str, TensorInfo]  # what they hold (gate_up, or gate and up; down) -> the tensor
    transposed: bool  # whether the stacks are [experts, in, out]

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for all layers whose experts are alike."""
        stacks = ((role, info.shape, info.dtype_name) for role, info in self.stacks.items())
        return (re.sub(r"\d+", "*", self.base), *stacks)

    def cut(self, naming: Mapping[str, str]) -> Cut:
        """The matrices, under the names of one of `NAMINGS`; none where they don't lie so in the stacks."""
        found: dict[str, tuple[Target, ...]] = {}
        for role, info in self.stacks.items():
            whole = role in naming
            halves = [role] if whole else [half for half in ("gate", "up") if role == "gate_up" and half in naming]
            if not halves:
                return {}
            found[info.name] = tuple(
                self._matrix(info, expert, f"{self.base}.{expert}.{naming[half]}.weight", number, len(halves))
                for expert in range(info.shape[0])
                for number, half in enumerate(halves)
            )
        return found

    def _matrix(self, info: TensorInfo, expert: int, name: str, number: int, count: int) -> Target:
        """Part ``number`` of ``count`` of the rows of one expert's matrix."""
        _, *sides = info.shape
        strides = contiguous_strides(sides)
        (rows, cols), steps = (sides[::-1], strides[::-1]) if self.transposed else (sides, strides)
        rows //= count
        offset = expert * sides[0] * sides[1] + number * rows * steps[0]
        piece = Piece((0, 0), (rows, cols), info.name, offset, tuple(steps))
        return Target(name, (rows, cols), None, kinds.LINEAR, (piece,))


@dataclass
class Series:
    """Experts of all layers in which they are alike: what a reader says of one, it says of all."""

    layers: list[Experts]
    naming: int | None = 0  # in `NAMINGS`; None: they stay stacks
    _cuts: dict[int, list[Cut]] = field(default_factory=dict)

    def cuts(self) -> list[Cut]:
        if self.naming is None:
            return []
        if self.naming not in self._cuts:
            cuts = [layer.cut(NAMINGS[self.naming]) for layer in self.layers]
            self._cuts[self.naming] = [cut for cut in cuts if cut]
        return self._cuts[self.naming]

    def names(self) -> set[str]:
        """Of the matrices."""
        return {matrix.name for cut in self.cuts() for matrices in cut.values() for matrix in matrices}

    def next(self) -> bool:
        """Go on to the next naming that there is for such stacks; returns whether there was one."""
        first = 0 if self.naming is None else self.naming + 1
        for naming in range(first, len(NAMINGS)):
            self.naming = naming
            if self.cuts():
                return True
        return False


def find_series(checkpoint: Checkpoint) -> list[Series]:
    """The experts that `find_experts` finds, by what they are like."""
    found: dict[Any, Series] = {}
    for experts in find_experts(checkpoint):
        found.setdefault(experts.key, Series([])).layers.append(experts)
    return list(found.values())


def find_experts(checkpoint: Checkpoint) -> Iterator[Experts]:
    """All experts in stacks that can be cut: of floats, without biases, with shapes that tell which axis is which.

    A stack with a bias beside it interleaves gate and up in all models that are known (gpt-oss), and no reader that
    takes FP8 is.
    """
    tensors = checkpoint.tensors
    groups: dict[str, dict[str, TensorInfo]] = {}
    for info in tensors.values():
        if kinds.kind_by_name(info, checkpoint.config, tensors) != kinds.EXPERTS or not info.quantizable:
            continue
        parent, _, leaf = kinds.module_of(info.name).rpartition(".")
        role = _ROLES.get(leaf)
        if role and not {f"{parent}.{leaf}_bias", f"{parent}.{leaf}.bias"} & tensors.keys():
            base = parent if parent.rpartition(".")[2] == "experts" else f"{parent}.experts"
            groups.setdefault(base, {}).setdefault(role, info)
    for base, stacks in groups.items():
        transposed = _transposed(stacks, kinds.values_of(checkpoint.config, "hidden_size"))
        free = tensors.keys().isdisjoint(f"{base}.0.{leaf}.weight" for naming in NAMINGS for leaf in naming.values())
        if transposed is not None and free:
            yield Experts(base, stacks, transposed)


def _transposed(stacks: Mapping[str, TensorInfo], hidden: Collection[Any]) -> bool | None:
    """Return True if stacks are [experts, in, out], False if they are [experts, out, in], None if shapes don't tell."""
    shapes = {role: info.shape for role, info in stacks.items()}
    if len({(shape[0], info.dtype_name) for shape, info in zip(shapes.values(), stacks.values(), strict=True)}) > 1:
        return None
    down = shapes.get("down")
    if down is None or 0 in down or down[0] > _MAX_EXPERTS:
        return None
    if shapes.keys() == {"gate_up", "down"}:
        # [2n, k] and [k, n], or [k, 2n] and [n, k]: never both
        first = shapes["gate_up"][1:]
        if first == (2 * down[2], down[1]):
            return False
        return True if first == (down[2], 2 * down[1]) else None
    if shapes.keys() in ({"gate", "up", "down"}, {"up", "down"}):
        if any(shape[1:] != down[:0:-1] for role, shape in shapes.items() if role != "down"):
            return None
        # [n, k] and [k, n] both ways: only the model's own size tells
        known = [side in hidden for side in down[1:]]
        return known.index(True) == 1 if known.count(True) == 1 else None
    return None


__all__ = ["NAMINGS", "Cut", "Experts", "Series", "find_experts", "find_series"]
