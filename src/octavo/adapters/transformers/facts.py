"""The parameters of a transformers model: what each is, as its module tells.

Planning asks: is it the weight of a linear layer, a stack of experts, or something that stays as it is, and why?
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from ...checkpoint import dtypes
from ...planning import kinds

#: the stacks of an experts module, each one parameter [experts, out, in] (or [experts, in, out])
_STACKS = ("gate_up_proj", "up_proj", "down_proj")
#: subclasses of a linear layer whose forward is the same
_LINEAR_SUBCLASSES = frozenset({"FalconLinear"})


@dataclass(frozen=True)
class Fact:
    """One parameter: its kind, and what is known of it."""

    kind: str  # `kinds.LINEAR` or `kinds.EXPERTS`; for all others, the reason why they are not quantized
    transposed: bool = False  # a stack that its class stores [experts, in, out]
    keep: str | None = None  # what it is, if it could be quantized but stays by default


def facts_of(model: Any) -> dict[str, Fact]:
    """Name -> fact, for every parameter."""
    facts = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            name = prefix + leaf
            keep = "output head" if module is head else None
            if parameter.dtype not in dtypes.QUANTIZABLE or leaf.endswith("_scale"):
                facts[name] = Fact("quantized already")
            elif _is_linear(module) and leaf == "weight":
                parent, _, child = path.rpartition(".")
                read = _reads_weight(type(model.get_submodule(parent)), child)  # type: ignore[arg-type]
                facts[name] = Fact("its weight is read by another module" if read else kinds.LINEAR, keep=keep)
            elif _is_experts(module) and leaf in _STACKS and parameter.ndim == 3:
                facts[name] = Fact(kinds.EXPERTS, transposed=bool(module.is_transposed))
            elif leaf.endswith("bias"):
                facts[name] = Fact("bias")
            elif parameter.ndim == 1:
                facts[name] = Fact("vector")
            else:
                facts[name] = Fact(f"{type(module).__name__}, not a linear layer", keep=keep)
    return facts


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ in _LINEAR_SUBCLASSES


@functools.cache
def _reads_weight(parent: Any, child: str) -> bool:
    """Return True if a class uses ``self.child.weight`` itself, beside calling the layer.

    FP8 numbers without their scales would surprise it. T5's ``wo`` and Mamba's ``dt_proj`` are used like that.
    """
    written = re.compile(rf"self\.{re.escape(child)}\.weight\b")
    for cls in parent.__mro__:
        # finding the source takes a while, so the names that the code uses are looked at first
        if cls not in nn.Module.__mro__ and any({child, "weight"} <= {*code.co_names} for code in _codes(cls)):
            with contextlib.suppress(OSError, TypeError):
                if written.search(inspect.getsource(cls)):
                    return True
    return False


def _codes(cls: Any) -> Iterator[CodeType]:
    """The code of a class's own methods and properties, of what their decorators wrap, and of functions within them."""
    left: list[Any] = [*vars(cls).values()]
    seen = set()
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, CodeType):
            yield found
            left += (constant for constant in found.co_consts if isinstance(constant, CodeType))
        elif inspect.isfunction(found):
            left += (found.__code__, getattr(found, "__wrapped__", None))
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                left += (c for cell in found.__closure__ or () if inspect.isfunction(c := cell.cell_contents))
        elif isinstance(found, property):
            left += (found.fget, found.fset)
        else:  # static and class methods, partial methods, cached properties
            left += (getattr(found, "__wrapped__", None), getattr(found, "func", None))


def _is_experts(module: nn.Module) -> bool:
    """Return True if transformers' ``use_experts_implementation`` made the class, whose flags tell how to run it."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "down_proj"))
