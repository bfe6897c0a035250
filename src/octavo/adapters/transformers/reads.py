"""What a model's own code does with the weights of linear layers, beside calling the layers.

FP8 numbers without their scales would surprise it. Code that asks for a weight's dtype or shape alone, or that comes to
its numbers in training alone, is served by layers that answer for their weight (`running.modules.ReadLinear`). A weight
whose numbers inference reads stays as it is.
"""

from __future__ import annotations

import ast
import enum
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from .code import Guard, Source, chain_of, is_dead, names_in, source_of

#: what a tensor tells without its numbers: attributes, and methods
TOLD = frozenset({"dtype", "device", "shape", "ndim", "is_meta", "is_cuda", "requires_grad", "layout"})
TOLD_BY = frozenset({"size", "dim", "numel", "is_floating_point", "get_device", "element_size", "is_contiguous"})
_TESTS = frozenset({"isinstance", "hasattr", "type"})


class Reading(enum.IntEnum):
    """How much of a weight is read, most last."""

    NOTHING = 0
    FORM = 1  # dtype, shape, device
    IN_TRAINING = 2
    NUMBERS = 3


@dataclass(frozen=True)
class _Use:
    chain: tuple[str, ...]  # as `code.chain_of`, without the weight's own name
    guards: tuple[Guard, ...]
    form_only: bool


class Reads:
    """Tells of a model's linear layers how other modules read their weights.

    Args:
        code: each class of its modules -> the functions that a forward may come to.
    """

    def __init__(self, modules: Mapping[str, nn.Module], code: Mapping[type, list[CodeType]]) -> None:
        self._modules = modules
        self._near: dict[type, dict[tuple[str, ...], list[_Use]]] = {}
        self._far: dict[tuple[str, ...], list[tuple[nn.Module, _Use]]] = defaultdict(list)
        first = {type(module): module for module in reversed([*modules.values()])}
        for cls, codes in code.items():
            near: dict[tuple[str, ...], list[_Use]] = defaultdict(list)
            for use in (use for code in codes for use in _uses(code)):
                root, *chain = use.chain
                if root == "self" and "*" not in chain:
                    near[tuple(chain)].append(use)
                elif after := _after_last(chain, "*"):  # below some module, wherever that is
                    self._far[after].append((first[cls], use))
            self._near[cls] = near
        self._depth = max((len(chain) for near in self._near.values() for chain in near), default=0)

    def of(self, path: str) -> Reading:
        """How the weight of the linear layer ``path`` is read."""
        found = Reading.NOTHING
        for module, use in self._uses_of(path.split(".")):
            if use.form_only:
                reading = Reading.FORM
            else:
                reading = Reading.IN_TRAINING if is_dead(use.guards, module) else Reading.NUMBERS
            found = max(found, reading)
        return found

    def _uses_of(self, parts: list[str]) -> Iterator[tuple[nn.Module, _Use]]:
        for length in range(1, min(len(parts), self._depth) + 1):
            module = self._modules[".".join(parts[:-length])]
            for use in self._near[type(module)].get(tuple(parts[-length:]), ()):
                yield module, use
        for after, uses in self._far.items():
            if tuple(parts[-len(after) :]) == after:
                yield from uses


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType) -> tuple[_Use, ...]:
    """Where a function reads the weight of another module."""
    if "weight" not in names_in(code) or (source := source_of(code)) is None:
        return ()
    found = []
    for node in source.attributes.get("weight", ()):
        chain = chain_of(node.value)
        if chain is not None and len(chain) > 1:
            found.append(_Use(chain, tuple(source.guards(node)), tells_form_alone(source, node)))
    return tuple(found)


def tells_form_alone(source: Source, node: ast.expr) -> bool:
    """Return True if code asks a tensor for what it tells without its numbers."""
    parent = source.parents.get(node)
    if isinstance(parent, ast.Attribute):
        return parent.attr in TOLD or (parent.attr in TOLD_BY and isinstance(source.parents[parent], ast.Call))
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in _TESTS
    return isinstance(parent, ast.Compare) and isinstance(parent.ops[0], (ast.Is, ast.IsNot))


def _after_last(chain: list[Any], mark: str) -> tuple[str, ...]:
    while mark in chain:
        chain = chain[chain.index(mark) + 1 :]
    return tuple(chain)
