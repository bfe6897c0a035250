"""Modules that run after loading: linear layers and expert stacks that hold quantized weights and their scales.

`linear` computes their products: `fp8` on a GPU with FP8 units, `weight_only` elsewhere. Where code reads a weight by
its name, it is given what `widened` makes of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numerics import schemes
from . import fp8
from .linear import linear
from .made import Made
from .widened import Codes, Values, Widened


class QuantizedLinear(nn.Linear):
    """A linear layer with ``weight`` as its scheme stores it, and ``weight_scale`` beside it.

    Made from a linear layer whose parameters may be on meta; storage is assigned later.
    """

    _hf_quantized_needs_local_tp = True  # transformers: hand forward local partitions, not DTensors

    weight_scale: Tensor
    activation_dtype: torch.dtype

    def __init__(self, like: nn.Linear, scheme: str, parts: tuple[int, ...] | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scheme, self.parts = scheme, parts or (like.out_features,)
        self.activation_dtype = like.weight.dtype
        self.weight = _frozen(_meta_weight(like.weight.shape, scheme))
        self.weight_scale = _frozen(_meta_scale(like.weight.shape, scheme, self.parts))
        self.bias = like.bias
        self.training = like.training

    def forward(self, input: Tensor) -> Tensor:
        # not as attributes: hooks may call what was the forward before the layer came to be read
        weight, scale = self._parameters["weight"], self._parameters["weight_scale"]
        assert weight is not None
        assert scale is not None
        _require_codes(self, weight)
        return linear(input, weight, scale, self.scheme, self.parts, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _refuse_casts(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        if not _refuse_wide(self, state, prefix, ["weight"], rest[-1]):
            super()._load_from_state_dict(state, prefix, *rest)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations, for which adapters (peft's) ask before anything else.

        Some of them go on to read the weight, or change it: from now on it reads as its values, and can't be changed.
        """
        if type(self) is QuantizedLinear:
            self.__class__ = ReadLinear
            self.__dict__["octavo_serves"] = True
        return self.activation_dtype

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class ReadLinear(QuantizedLinear):
    """A quantized linear layer whose ``weight`` other code reads, as `Widened`.

    So it is once `serve` has been called: whoever loads weights meets parameters as they are.
    """

    octavo_serves = False
    is_read_in_training = False  # perhaps by code that torch knows nothing of

    def __getattr__(self, name: str) -> Any:
        if name != "weight" or not self.octavo_serves:
            return super().__getattr__(name)
        form = Form(self.activation_dtype)
        return _read(self, name, self.scheme, self.parts, form, plain=self.training and self.is_read_in_training)


class _Stacks(Made):
    """Mixed into a class of modules that hold stacks, stored [experts, out, in] whatever the layout of the class."""

    _hf_quantized_needs_local_tp = True
    octavo_stacks: dict[str, tuple[str, tuple[int, ...]]]  # stack name -> scheme, parts

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        _refuse_casts(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def _load_from_state_dict(self: Any, state: Any, prefix: str, *rest: Any) -> None:
        if not _refuse_wide(self, state, prefix, self.octavo_stacks, rest[-1]):
            super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[misc]


@dataclass(frozen=True)
class Form:
    """How code reads a weight: its dtype, whether transposed, and its shape where that is one matrix of all rows."""

    dtype: torch.dtype
    flipped: bool = False
    shape: tuple[int, ...] | None = None


class ReadStacks(_Stacks):
    """Mixed into a class whose forward, or that of a module around it, reads stacks by their names, as `Widened`.

    So it is once `serve` has been called.
    """

    octavo_serves = False
    octavo_forms: dict[str, Form]

    def __getattr__(self: Any, name: str) -> Any:
        if name not in self.__dict__.get("octavo_forms", ()) or not self.octavo_serves:
            return super().__getattr__(name)  # type: ignore[misc]
        scheme, parts = self.octavo_stacks[name]
        return _read(self, name, scheme, parts, self.octavo_forms[name])


class QuantizedExperts(_Stacks):
    """Mixed into a model's own experts class, whose gate, activation, flags and biases stay."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [..., hidden], top_k_index and top_k_weights [tokens, k] -> [..., hidden]."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        up = "gate_up_proj" if self.has_gate else "up_proj"
        if self._takes_fp8(hidden, top_k_weights, up):
            total: Tensor = self._forward_at_once(hidden, top_k_index, top_k_weights, up)
        else:
            total = self._forward_in_turn(hidden, top_k_index, top_k_weights, up)
        return total.to(hidden_states.dtype).view(hidden_states.shape)

    def _takes_fp8(self: Any, hidden: Tensor, weights: Tensor, up: str) -> bool:
        """Return True if both stacks are quantized, and `fp8` computes with them."""
        names = (up, "down_proj")
        if not all(name in self.octavo_stacks for name in names):
            return False
        biases = [getattr(self, f"{name}_bias", None) for name in names]
        parts = [self.octavo_stacks[name][1] for name in names]
        stacks = (getattr(self, name) for name in names)
        return all(fp8.takes(hidden, stack, weights, *biases) for stack in stacks) and fp8.takes_experts(parts)

    def _forward_at_once(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: str) -> Tensor:
        """All experts in the same few kernels; nothing waits for the routing to be known."""
        experts, top_k = getattr(self, up).shape[0], top_k_index.shape[-1]
        ids, order, ends, position = top_k_index.reshape(-1), None, None, None
        if not fp8.use_pairs(len(ids)):
            ids, order, ends, position = fp8.sort_routes(ids, experts)

        def project(x: Tensor, name: str, top_k: int, gather: bool) -> Tensor:
            scheme, parts = self.octavo_stacks[name]
            stack, scale = getattr(self, name), getattr(self, f"{name}_scale")
            return fp8.expert_linear(x, stack, scale, scheme, parts, self._bias(name), ids, order, ends, top_k, gather)

        y = project(hidden, up, top_k, True)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = project(y, "down_proj", 1, False)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return fp8.combine(y, top_k_index, top_k_weights, experts, position)

    def _forward_in_turn(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, up: str) -> Tensor:
        """Expert by expert, weight-only; waits for the routing."""
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        local_experts = getattr(self, up).shape[0]
        for expert in torch.unique(top_k_index).tolist():
            if expert >= local_experts:
                continue  # expert parallel: another rank's
            token, position = torch.where(top_k_index == expert)
            y = self._expert_linear(hidden[token], up, expert)
            y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
            y = self._expert_linear(y, "down_proj", expert)
            if getattr(self, "has_post_expert_norm", False):
                y = self.post_expert_norm(y)
            total.index_add_(0, token, y.float() * top_k_weights[token, position, None].float())
        return total

    def _bias(self: Any, name: str) -> Tensor | None:
        bias: Tensor | None = getattr(self, f"{name}_bias", None)
        return bias if getattr(self, "has_bias", True) else None

    def _expert_linear(self: Any, x: Tensor, name: str, expert: int) -> Tensor:
        stack, biases = getattr(self, name), self._bias(name)
        bias = None if biases is None else biases[expert]
        if name not in self.octavo_stacks:  # kept by the recipe
            weight = stack[expert]
            return F.linear(x, weight.T if self.is_transposed else weight, bias)
        scheme, parts = self.octavo_stacks[name]
        return linear(x, stack[expert], getattr(self, f"{name}_scale")[expert], scheme, parts, bias)


def quantize_linear(
    model: nn.Module, name: str, scheme: str, parts: tuple[int, ...], kind: type[QuantizedLinear] = QuantizedLinear
) -> QuantizedLinear:
    """Give the linear layer ``name`` of ``model`` its quantized form, storage not yet assigned.

    It stays the same object, since models have lists of their layers, too, that torch knows nothing of.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    made = kind(layer, scheme, parts)
    layer.__class__, layer.__dict__ = kind, made.__dict__
    return cast(QuantizedLinear, layer)


def quantize_stack(experts: Any, name: str, scheme: str, shape: tuple[int, ...], parts: tuple[int, ...]) -> None:
    """Make ``experts.name`` a stack [experts, out, in] = ``shape`` in FP8, storage not yet assigned."""
    if not isinstance(experts, _Stacks):
        experts.__class__ = _quantized_class(QuantizedExperts, type(experts))  # type: ignore[arg-type]
        experts.octavo_stacks = {}
    setattr(experts, name, _frozen(_meta_weight(shape, scheme)))
    experts.register_parameter(f"{name}_scale", _frozen(_meta_scale(shape, scheme, parts)))
    experts.octavo_stacks[name] = (scheme, parts)


def quantize_read_stack(
    module: Any, name: str, scheme: str, shape: tuple[int, ...], parts: tuple[int, ...], form: Form
) -> None:
    """The same for a stack that code reads by its name."""
    if not isinstance(module, ReadStacks):
        module.__class__ = _quantized_class(ReadStacks, type(module))  # type: ignore[arg-type]
        module.octavo_stacks, module.octavo_forms = {}, {}
    quantize_stack(module, name, scheme, shape, parts)
    module.octavo_forms[name] = form


@functools.cache
def _quantized_class(mixin: type, cls: type) -> type:
    return type(f"Quantized{cls.__name__}", (mixin, cls), {"octavo_made": (_quantized_class, (mixin, cls))})


def serve(model: nn.Module) -> None:
    """Let weights be read as their values, once all of them are there."""
    for module in model.modules():
        if isinstance(module, (ReadLinear, ReadStacks)):
            module.octavo_serves = True


def _read(module: Any, name: str, scheme: str, parts: tuple[int, ...], form: Form, *, plain: bool = False) -> Any:
    """What code is given that reads ``module.name``."""
    weight, scale = module._parameters[name], module._parameters[scale_name(name)]
    _require_codes(module, weight)
    if weight.is_meta:
        return weight
    codes = Codes(weight.detach(), scale.detach(), scheme, parts)
    if not plain and not torch.compiler.is_compiling():
        return Widened(codes, form.dtype, form.flipped, form.shape)
    values = codes.plain(form.dtype, form.flipped, form.shape)
    return values.as_subclass(Values) if plain else values


def _require_codes(module: Any, weight: Tensor) -> None:
    if weight.dtype not in schemes.HELD:
        raise TypeError(
            f"{type(module).__name__} holds {weight.dtype} where quantized numbers were: something cast them"
        )


def as_stored(
    module: Any, name: str, shape: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a weight as its class has it -> of the same weight as it is stored when quantized."""
    form = module.octavo_forms.get(name) if isinstance(module, ReadStacks) else None
    flipped = form.flipped if form is not None else len(shape) == 3 and getattr(module, "is_transposed", False)
    found = list(zip(shape, strides, strict=True))
    if form is not None and form.shape is not None and len(shape) == 2:
        scheme = schemes.get(module.octavo_stacks[name][0])
        stacks, rows, cols = scheme.weight_shape(module._parameters[name].shape)
        rows = cols if flipped else rows
        found = [(stacks, rows * strides[0]), (shape[0] // stacks, strides[0]), found[1]]
    if flipped:
        found[-2:] = reversed(found[-2:])
    return tuple(length for length, _ in found), tuple(stride for _, stride in found)


def _refuse_casts(module: Any, fn: Any) -> None:
    """``model.to(dtype)`` would make unscaled weights of FP8, or round scales: raise instead. Moving is fine."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype in schemes.HELD:
            if fn(parameter.new_empty(0, dtype=schemes.FP8)).dtype != schemes.FP8:  # what floats become
                raise TypeError(
                    "a model with quantized weights can't be cast; give octavo.load the dtype for the rest of it"
                )
            return


def _refuse_wide(
    module: Any, state: Mapping[str, Tensor], prefix: str, names: Iterable[str], errors: list[str]
) -> bool:
    """``load_state_dict`` of bf16 weights would cast them to FP8 without a scale: leave an error, write nothing."""
    dtypes = {prefix + name: module._parameters[name].dtype for name in names}
    wide = [name for name, dtype in dtypes.items() if name in state and state[name].dtype != dtype]
    for name in wide:
        here = schemes.HELD[dtypes[name]].name
        errors.append(f"{name}: {state[name].dtype} into {here} weights; octavo.update(model, state_dict) quantizes")
    return bool(wide)


def scale_name(name: str) -> str:
    """The parameter that holds a quantized parameter's scale: ``a.weight`` -> ``a.weight_scale``."""
    return f"{name}_scale"


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, scheme, parts) of every quantized parameter."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedLinear):
            yield f"{prefix}weight", module.scheme, module.parts
        elif isinstance(module, _Stacks):
            for name, (scheme, parts) in module.octavo_stacks.items():
                yield f"{prefix}{name}", scheme, parts


def _meta_weight(shape: tuple[int, ...], scheme: str) -> Tensor:
    found = schemes.get(scheme)
    return torch.empty(found.stored_shape(shape), dtype=found.dtype, device="meta")


def _meta_scale(shape: tuple[int, ...], scheme: str, parts: tuple[int, ...]) -> Tensor:
    found = schemes.get(scheme)
    return torch.empty(found.scale_shape(shape, parts), dtype=found.scale_dtype, device="meta")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
