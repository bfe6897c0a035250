"""The source of a model's own code, as far as a forward may come: what `reads` asks.

Nothing is run. Functions are found by the names that code in reach of a forward uses, and read as syntax trees.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

#: classes of these modules hold no model's own code
_LIBRARIES = ("torch.", "transformers.modeling_", "transformers.generation.", "transformers.utils.", "builtins")
#: what is read as unknown, where a condition is evaluated
_UNKNOWN = object()

Guard = tuple[ast.expr, bool]


@dataclass(frozen=True)
class Source:
    """A function as a syntax tree."""

    parents: dict[ast.AST, ast.AST]
    attributes: dict[str, list[ast.Attribute]]  # by name
    variables: dict[str, list[ast.Name]]

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """A node and its parent, then that and its own, up to the function."""
        while node in self.parents:
            yield node, self.parents[node]
            node = self.parents[node]

    def guards(self, node: ast.AST) -> list[Guard]:
        """The conditions under which code comes to a node, and whether each is true there."""
        found: list[Guard] = []
        for child, parent in self.above(node):
            if isinstance(parent, (ast.If, ast.While)) and child is not parent.test:
                found.append((parent.test, child in parent.body))
            elif isinstance(parent, ast.IfExp) and child is not parent.test:
                found.append((parent.test, child is parent.body))
            elif isinstance(parent, ast.BoolOp):
                earlier = parent.values[: next(i for i, value in enumerate(parent.values) if value is child)]
                found += [(value, isinstance(parent.op, ast.And)) for value in earlier]
        return found


@functools.lru_cache(maxsize=4096)
def source_of(code: CodeType) -> Source | None:
    """The source of a function's code, or None where there is none."""
    with contextlib.suppress(OSError, TypeError, SyntaxError, IndexError):
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
        found = Source({child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}, {}, {})
        for node in found.parents:
            if isinstance(node, ast.Attribute):
                found.attributes.setdefault(node.attr, []).append(node)
            elif isinstance(node, ast.Name):
                found.variables.setdefault(node.id, []).append(node)
        return found
    return None


def own_classes(cls: type) -> list[type]:
    """A module's class and those that it inherits from, without torch's and transformers' general ones."""
    return [c for c in cls.__mro__ if not f"{c.__module__}.".startswith(_LIBRARIES)]


@functools.lru_cache(maxsize=4096)
def functions_of(cls: type) -> dict[str, tuple[CodeType, ...]]:
    """Name -> code of each of a class's own methods and properties, and of what their decorators wrap."""
    return {name: tuple(dict.fromkeys(_codes(value))) for name, value in vars(cls).items()}


def _codes(value: Any) -> Iterator[CodeType]:
    left: list[Any] = [value]
    seen = set()
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if inspect.isfunction(found):
            yield found.__code__
            left.append(getattr(found, "__wrapped__", None))
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                left += (c for cell in found.__closure__ or () if inspect.isfunction(c := cell.cell_contents))
        elif isinstance(found, property):
            left += (found.fget, found.fset)
        else:  # static and class methods, partial methods, cached properties
            left += (getattr(found, "__wrapped__", None), getattr(found, "func", None))


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """The names that code uses, functions within it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*map(names_in, inner))


def reachable(classes: Iterable[type]) -> dict[type, list[CodeType]]:
    """The code of modules' classes to which a forward may come: each class -> its functions, inherited ones too.

    Users call the public methods of a model themselves. For other modules, it is what code in reach names.
    """
    chains = {cls: own_classes(cls) for cls in classes}
    functions = {owner: functions_of(owner) for chain in chains.values() for owner in chain}
    names = {"forward", "__call__"}
    for owner, own in functions.items():
        if hasattr(owner, "from_pretrained"):
            names.update(name for name in own if not name.startswith("_"))
    left, seen = [*names], set[str]()
    by_name: dict[str, list[CodeType]] = {}
    for own in functions.values():
        for name, codes in own.items():
            by_name.setdefault(name, []).extend(codes)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += (used for code in by_name.get(name, ()) for used in names_in(code) if used in by_name)
    seen -= {"__init__"}
    return {
        cls: [code for owner in chain for name, codes in functions[owner].items() if name in seen for code in codes]
        for cls, chain in chains.items()
    }


def chain_of(node: ast.expr) -> tuple[str, ...] | None:
    """``self.a.b[0].c`` -> ("self", "a", "b", "*", "c"); None for anything else."""
    parts: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            parts.append("*")
            node = node.value
        else:
            return None
    return (node.id, *reversed(parts))


def value_of(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression that ``self`` alone determines, or raise a LookupError."""
    found = _evaluate(node, module)
    if found is _UNKNOWN:
        raise LookupError(ast.unparse(node))
    return found


def is_dead(guards: Iterable[Guard], module: nn.Module) -> bool:
    """Return True if inference does not come where these hold: it never trains, and the module is as it is."""
    return any(
        (found := _evaluate(test, module)) is not _UNKNOWN and bool(found) != expected for test, expected in guards
    )


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


def _evaluate(node: ast.expr, module: nn.Module) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        operand = _evaluate(node.operand, module)
        if operand is not _UNKNOWN and isinstance(node.op, ast.Not):
            return not operand
        return -operand if isinstance(node.op, ast.USub) and isinstance(operand, (int, float)) else _UNKNOWN
    if isinstance(node, ast.BoolOp):
        stops = isinstance(node.op, ast.Or)  # "or" ends with what is true, "and" with what is not
        values = [_evaluate(value, module) for value in node.values]
        known = [bool(value) for value in values if value is not _UNKNOWN]
        return stops if stops in known else _UNKNOWN if len(known) < len(values) else not stops
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        sides = [_evaluate(side, module) for side in (node.left, node.comparators[0])]
        if _UNKNOWN not in sides:
            with contextlib.suppress(TypeError):
                return _COMPARE[type(node.ops[0])](*sides)
    if isinstance(node, ast.Attribute) and (chain := chain_of(node)) and chain[0] == "self" and "*" not in chain:
        if chain[-1] == "training":
            return False
        found: Any = module
        for name in chain[1:]:
            found = vars(found).get(name, _UNKNOWN) if hasattr(found, "__dict__") else _UNKNOWN
        return found if isinstance(found, (bool, int, float, str, type(None))) else _UNKNOWN
    return _UNKNOWN
