"""The parameters of a transformers model: what each is, as its module tells.

Planning asks: is it the weight of a linear layer, a stack of experts, or something that stays as it is, and why?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...checkpoint import dtypes
from ...planning import kinds
from .code import reachable
from .reads import Reading, Reads
from .stacks import Stack, Stacks

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
    reading: Reading = Reading.NOTHING  # of a linear layer's weight: how other modules read it
    stack: Stack | None = None  # how code reads it, where the class is not transformers' kind of experts


def facts_of(model: Any) -> dict[str, Fact]:
    """Name -> fact, for every parameter."""
    modules = dict(model.named_modules())
    code = reachable({type(module) for module in modules.values()})
    reads, stacks = Reads(modules, code), Stacks(modules, code)
    facts = {}
    head, vocabularies = model.get_output_embeddings(), _vocabularies(model)
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            name = prefix + leaf
            keep = "output head" if module is head else None
            if parameter.dtype not in dtypes.QUANTIZABLE or leaf.endswith("_scale"):
                facts[name] = Fact("quantized already")
            elif _is_linear(module) and leaf == "weight":
                reading = reads.of(path)
                kind = "its weight is read by another module" if reading == Reading.NUMBERS else kinds.LINEAR
                facts[name] = Fact(kind, keep=keep, reading=reading)
            elif _is_experts(module) and leaf in _STACKS and parameter.ndim == 3:
                facts[name] = Fact(kinds.EXPERTS, transposed=bool(module.is_transposed))
            elif leaf.endswith("bias"):
                facts[name] = Fact("bias")
            elif parameter.ndim == 1:
                facts[name] = Fact("vector")
            elif stack := stacks.find(path, leaf):
                if vocabularies.intersection(parameter.shape[1:]):
                    keep = "output head"
                facts[name] = Fact(kinds.EXPERTS, stack.transposed, keep, stack=stack)
            else:
                facts[name] = Fact(f"{type(module).__name__}, not a linear layer", keep=keep)
    return facts


def _vocabularies(model: Any) -> set[Any]:
    """The sizes of the vocabularies of a model and its parts."""
    parts = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    return {getattr(part, "vocab_size", None) for part in parts}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ in _LINEAR_SUBCLASSES


def _is_experts(module: nn.Module) -> bool:
    """Return True if transformers' ``use_experts_implementation`` made the class, whose flags tell how to run it."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "down_proj"))
