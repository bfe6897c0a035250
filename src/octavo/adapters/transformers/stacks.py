"""Stacks of matrices that a model's own code multiplies by, one at a time or all at once: which, and along which axis.

Such code is never changed. It is followed from where it names the parameter, through views, experts taken out of it and
calls of the model's own functions, to products. Where it does nothing else, the parameter can be held as FP8, and
`running.widened.Widened` stands for it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from torch import nn

from .code import Source, chain_of, is_dead, names_in, own_classes, source_of, value_of
from .reads import TOLD_BY, tells_form_alone

#: products of an operand and a weight: the weight's last axis but one is summed over
_PRODUCTS = frozenset({"matmul", "bmm", "mm"})
#: what gives a weight back as it is
_SAME = frozenset({"contiguous", "detach", "data"})
_VIEWS = frozenset({"view", "reshape"})
#: functions that call each other, and no more
_DEPTH = 4


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, as code reads it."""

    transposed: bool  # it is [experts, in, out]
    apart: tuple[int, ...] | None = None  # of a matrix of all experts' rows: the shape that these have apart


class _Unfollowed(Exception):
    """Code does something else with a weight."""


@dataclass(frozen=True)
class _State:
    """What an expression is to the weight."""

    ndim: int  # at most: an index may be one expert or several
    flipped: bool = False
    joined: bool = False
    apart: tuple[int, ...] | None = None


class Stacks:
    """Tells of a model's parameters which are stacks.

    Args:
        code: each class of its modules -> the functions that a forward may come to.
    """

    def __init__(self, modules: Mapping[str, nn.Module], code: Mapping[type, list[CodeType]]) -> None:
        self._modules, self._code = modules, code

    def find(self, path: str, leaf: str) -> Stack | None:
        """How code reads the parameter ``leaf`` of a module, if as a stack and no otherwise."""
        module = self._modules[path]
        shape = tuple(module._parameters[leaf].shape)  # type: ignore[union-attr]
        if len(shape) not in (2, 3) or not own_classes(type(module)) or min(shape) == 1:
            return None
        start = _State(len(shape), joined=len(shape) == 2)
        found: set[Stack] = set()
        try:
            for reader, source, node in self._named(path, leaf):
                found.update(_Follower(reader, source, shape).follow(node, start))
        except _Unfollowed:
            return None
        return next(iter(found)) if len(found) == 1 else None

    def _named(self, path: str, leaf: str) -> Iterator[tuple[nn.Module, Source, ast.expr]]:
        """Where the module's code and that of the modules around it name the parameter."""
        chain: tuple[str, ...] = ("self", leaf)
        while True:
            reader = self._modules[path]
            for code in self._code[type(reader)]:
                if leaf in names_in(code) and (source := source_of(code)):
                    named = source.attributes.get(leaf, ())
                    yield from ((reader, source, node) for node in named if chain_of(node) == chain)
            if not path:
                return
            path, _, name = path.rpartition(".")
            chain = ("self", name, *chain[1:])


class _Follower:
    """Follows a weight through one function."""

    def __init__(self, module: nn.Module, source: Source, shape: tuple[int, ...], depth: int = 0) -> None:
        self.module, self.source, self.shape, self.depth = module, source, shape, depth

    def follow(self, node: ast.AST, state: _State) -> Iterator[Stack]:
        """What becomes of the value of a node."""
        parent = self.source.parents[node]
        if is_dead(self.source.guards(node), self.module) or tells_form_alone(self.source, node):  # type: ignore[arg-type]
            return
        if isinstance(parent, ast.Attribute):
            yield from self._attribute(parent, state)
        elif isinstance(parent, ast.Subscript) and node is parent.value:
            yield from self.follow(parent, self._indexed(parent.slice, state))
        elif isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult) and node is parent.right:
            yield self._product(state, last=False)
        elif isinstance(parent, ast.Call) and node is not parent.func:
            yield from self._argument(parent, node, state)
        elif isinstance(parent, ast.IfExp) and node is not parent.test:
            yield from self.follow(parent, state)
        elif isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            yield from self._variable(parent.targets[0], state)
        else:
            raise _Unfollowed

    def _product(self, state: _State, last: bool) -> Stack:
        """A product that sums over the last axis, or over that before it."""
        if state.joined:
            raise _Unfollowed
        return Stack(transposed=state.flipped == last, apart=state.apart)

    def _attribute(self, node: ast.Attribute, state: _State) -> Iterator[Stack]:
        call = self.source.parents[node]
        if node.attr in ("T", "mT"):
            yield from self.follow(node, self._flipped(state))
        elif node.attr in _SAME and not isinstance(call, ast.Call):
            yield from self.follow(node, state)
        elif isinstance(call, ast.Call) and call.func is node:
            if node.attr not in TOLD_BY:
                yield from self.follow(call, self._method(node.attr, call, state))
        else:
            raise _Unfollowed

    def _method(self, name: str, call: ast.Call, state: _State) -> _State:
        if name in _SAME:
            return state
        if name in _VIEWS and state.joined:
            return replace(state, ndim=3, joined=False, apart=self._apart(call))
        if name == "t":
            return self._flipped(state)
        if name == "index_select" and not state.joined:
            return state
        if name in ("transpose", "permute", "unsqueeze"):
            return self._moved(name, [_constant(argument) for argument in call.args], state)
        raise _Unfollowed

    def _moved(self, name: str, axes: list[Any], state: _State) -> _State:
        last = {state.ndim - 2, state.ndim - 1}
        if name == "unsqueeze" and axes == [0]:
            return replace(state, ndim=state.ndim + 1)
        if name == "transpose" and (set(axes) in (last, {-1, -2})):
            return self._flipped(state)
        if name == "permute" and axes == [*range(state.ndim - 2), state.ndim - 1, state.ndim - 2]:
            return self._flipped(state)
        raise _Unfollowed

    def _flipped(self, state: _State) -> _State:
        if state.joined:
            raise _Unfollowed
        return replace(state, flipped=not state.flipped)

    def _indexed(self, index: ast.expr, state: _State) -> _State:
        """Experts, or one of them; the matrices stay whole."""
        keys = list(index.elts) if isinstance(index, ast.Tuple) else [index]
        while keys and isinstance(keys[-1], ast.Slice) and not (keys[-1].lower or keys[-1].upper or keys[-1].step):
            keys.pop()
        new = [key for key in keys if isinstance(key, ast.Constant) and key.value is None]
        if state.joined or len(keys) - len(new) > state.ndim - 2:
            raise _Unfollowed
        gone = sum(key not in new and not isinstance(key, ast.Slice) for key in keys)
        return replace(state, ndim=max(2, state.ndim + len(new) - gone))

    def _apart(self, call: ast.Call) -> tuple[int, ...]:
        """The shape that a view takes a matrix of all experts' rows apart to."""
        given: list[ast.expr] = list(call.args)
        if len(given) == 1 and isinstance(given[0], ast.Name):
            given = [self._assigned(given[0].id)]
        if len(given) == 1 and isinstance(given[0], (ast.Tuple, ast.List)):
            given = list(given[0].elts)
        try:
            sizes = [value_of(size, self.module) for size in given]
        except LookupError:
            raise _Unfollowed from None
        rows, cols = self.shape
        if len(sizes) != 3 or not all(type(size) is int for size in sizes) or sizes[2] != cols or sizes[1] < 1:
            raise _Unfollowed
        if rows % sizes[1] or sizes[0] not in (-1, rows // sizes[1]):
            raise _Unfollowed
        return (rows // sizes[1], sizes[1], cols)

    def _assigned(self, name: str) -> ast.expr:
        """The one value that a variable is given."""
        stores = [node for node in self.source.variables.get(name, ()) if isinstance(node.ctx, ast.Store)]
        parent = self.source.parents[stores[0]] if len(stores) == 1 else None
        if not isinstance(parent, ast.Assign):
            raise _Unfollowed
        return parent.value

    def _argument(self, call: ast.Call, node: ast.AST, state: _State) -> Iterator[Stack]:
        keyword = next((k.arg for k in call.keywords if k.value is node), None)
        at = next((i for i, argument in enumerate(call.args) if argument is node), None)
        chain = chain_of(call.func)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else chain[-1] if chain else ""
        if name == "linear" and (at == 1 or keyword == "weight"):
            yield self._product(state, last=True)
        elif name in _PRODUCTS and at == (1 if chain and chain[0] == "torch" else 0):
            yield self._product(state, last=False)
        elif name == "index_select" and at == 0 and chain and chain[0] == "torch" and not state.joined:
            yield from self.follow(call, state)
        elif chain and chain[0] == "self" and "*" not in chain:
            yield from self._passed(chain[1:], at, keyword, state)
        else:
            raise _Unfollowed

    def _passed(self, chain: tuple[str, ...], at: int | None, keyword: str | None, state: _State) -> Iterator[Stack]:
        """Go on in another function of the model."""
        called: Any = self.module
        for name in chain:
            called = getattr(called, name, None)
        module, function = (called, type(called).forward) if isinstance(called, nn.Module) else (self.module, called)
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        source = source_of(code) if code is not None and self.depth < _DEPTH else None
        if source is None or code is None:
            raise _Unfollowed
        if keyword is None:
            names = code.co_varnames[: code.co_argcount]
            keyword = names[at + 1] if at is not None and at + 1 < len(names) else None
        if keyword is None:
            raise _Unfollowed
        follower = _Follower(module, source, self.shape, self.depth + 1)
        yield from follower.loads(keyword, 0, None, state)

    def _variable(self, target: ast.Name, state: _State) -> Iterator[Stack]:
        """Go on where a variable is read, until it gets another value."""
        named = self.source.variables[target.id]
        stores = sorted(node.lineno for node in named if isinstance(node.ctx, ast.Store))
        after = next((line for line in stores if line > target.lineno), None)
        yield from self.loads(target.id, target.lineno, after, state)

    def loads(self, name: str, begin: int, end: int | None, state: _State) -> Iterator[Stack]:
        """Go on where a variable is read after one line, and up to another."""
        for node in self.source.variables.get(name, ()):
            if isinstance(node.ctx, ast.Load) and begin < node.lineno <= (node.lineno if end is None else end):
                yield from self.follow(node, state)


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _Unfollowed from None
