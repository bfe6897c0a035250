"""What runs after loading: linear layers and expert stacks that hold FP8 weights and their scales.

Weight-only: activations stay bf16, fp16 or fp32, and weights are widened 128 rows at a time, exactly. On a
CPU the widening is integer arithmetic: an e4m3 number's bits, shifted into the place of a bf16 (or fp16) number's, are
that number times a power of two. That is several times faster than torch's own conversion, and than ``_scaled_mm``,
which has no fast CPU kernel.

Scales that are one a row multiply the *output*; they are never folded into bf16 weights, which would round them. Only
scales that vary along a row (blocks, mx) are, and where a half-precision output could overflow (fp16).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import schemes

_ROWS = 128
_ROWS_ON_DEVICE = 4096
_COMPUTE = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
# dtype -> (left shift as a factor, mask over the shifted sign-extended byte, what the bias lacks): see `widen`
_PLACES = {
    torch.bfloat16: (1 << 4, -30736, 2.0**120),  # 0x87F0: sign, 4 exponent and 3 mantissa bits; bias 127 - 7
    torch.float16: (1 << 7, -16512, 2.0**8),  # 0xBF80; bias 15 - 7
}


def widen(q: Tensor, dtype: torch.dtype, scratch: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """float8_e4m3fn -> bf16, fp16 or fp32, exactly, for all finite values.

    Args:
        scratch: int16, at least as many elements; the result may be a view of it.
        scale: bf16 of q's shape, below 2**7; if given, the result is ``q * scale`` rounded once, and dtype is bf16.
    """
    if q.device.type != "cpu":
        return q.to(dtype)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    if half not in _PLACES:
        return q.to(dtype)
    shift, mask, factor = _PLACES[half]
    scratch = torch.empty(q.numel(), dtype=torch.int16) if scratch is None else scratch[: q.numel()]
    bits = scratch.view(q.shape).copy_(q.view(torch.int8))
    bits.mul_(shift).bitwise_and_(mask)  # integers are multiplied faster than shifted
    return bits.view(half).mul_(factor if scale is None else scale * factor).to(dtype)


def linear(
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    scheme: str,
    parts: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x[..., in] @ dequantize(q[out, in]).T + bias``.

    The product is computed in x's dtype. Scales one a row multiply the output in float32.

    Raises:
        TypeError: x is not bf16, fp16, fp32 or fp64 (cast to the dtype of an FP8 weight, say).
    """
    if x.dtype not in _COMPUTE:
        raise TypeError(f"activations are {x.dtype}; FP8 weights are multiplied in bf16, fp16, fp32 or fp64")
    flat = x.reshape(-1, x.shape[-1])
    rows, cols = q.shape
    cells = schemes.row_scales(scale, (rows, cols), scheme, parts)  # float32 [out, column cells]
    each = schemes.get(scheme).group_cols
    by_row = each is None and x.dtype != torch.float16
    on_cpu = q.device.type == "cpu"
    step = min(rows, _ROWS if on_cpu else _ROWS_ON_DEVICE)
    # one buffer for all steps, unless each step's weight is kept for the gradient of x
    differentiable = torch.is_grad_enabled() and x.requires_grad
    scratch = torch.empty(step * cols, dtype=torch.int16) if on_cpu and not differentiable else None
    # one pass instead of four, where a scale times 2**120 is still a number; bf16 can hold every scale
    in_one = on_cpu and not by_row and x.dtype == torch.bfloat16 and bool(cells.max() < 2.0**7)
    out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        if by_row:
            weight = widen(q[start:stop], x.dtype, scratch)
        else:
            spread = cells[start:stop].to(torch.bfloat16 if in_one else torch.float32)
            spread = spread if each is None else spread.repeat_interleave(each, -1)[:, :cols]
            if in_one:
                weight = widen(q[start:stop], x.dtype, scratch, spread)
            else:
                weight = (widen(q[start:stop], x.dtype, scratch).float() * spread).to(x.dtype)
        out[:, start:stop] = F.linear(flat, weight)
    if by_row:
        out = (out.float() * cells.view(1, -1)).to(x.dtype)
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], rows)


class QuantizedLinear(nn.Linear):
    """A linear layer with ``weight`` in float8_e4m3fn and ``weight_scale`` beside it.

    Made from a linear layer whose parameters may be on meta; storage is assigned later.
    """

    _hf_quantized_needs_local_tp = True  # transformers: hand forward local partitions, not DTensors

    weight_scale: Tensor

    def __init__(self, like: nn.Linear, scheme: str, parts: tuple[int, ...] | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.scheme, self.parts = scheme, parts or (like.out_features,)
        self.weight = _frozen(torch.empty(like.weight.shape, dtype=schemes.FP8, device="meta"))
        self.weight_scale = _frozen(_meta_scale(like.weight.shape, scheme, self.parts))
        self.bias = like.bias
        self.training = like.training

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.weight_scale, self.scheme, self.parts, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        _refuse_casts(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class QuantizedExperts:
    """Mixed into a model's own experts class, whose gate, activation, flags and biases stay.

    Stacks are stored [experts, out, in], whatever the layout of the class (``is_transposed``).
    """

    _hf_quantized_needs_local_tp = True
    octavo_stacks: dict[str, tuple[str, tuple[int, ...]]]  # stack name -> scheme, parts

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        _refuse_casts(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [..., hidden], top_k_index and top_k_weights [tokens, k] -> [..., hidden]."""
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        up = "gate_up_proj" if self.has_gate else "up_proj"
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
        return total.to(hidden_states.dtype).view(hidden_states.shape)

    def _expert_linear(self: Any, x: Tensor, name: str, expert: int) -> Tensor:
        stack, biases = getattr(self, name), getattr(self, f"{name}_bias", None)
        bias = biases[expert] if biases is not None and getattr(self, "has_bias", True) else None
        if name not in self.octavo_stacks:  # kept by the recipe
            weight = stack[expert]
            return F.linear(x, weight.T if self.is_transposed else weight, bias)
        scheme, parts = self.octavo_stacks[name]
        return linear(x, stack[expert], getattr(self, f"{name}_scale")[expert], scheme, parts, bias)


def quantize_linear(model: nn.Module, name: str, scheme: str, parts: tuple[int, ...]) -> None:
    """Replace the linear layer ``name`` of ``model`` by its quantized form, storage not yet assigned."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    model.set_submodule(name, QuantizedLinear(layer, scheme, parts))


def quantize_stack(experts: Any, name: str, scheme: str, shape: tuple[int, ...], parts: tuple[int, ...]) -> None:
    """Make ``experts.name`` a stack [experts, out, in] = ``shape`` in FP8, storage not yet assigned."""
    if not isinstance(experts, QuantizedExperts):
        experts.__class__ = _quantized_class(type(experts))  # type: ignore[arg-type]
        experts.octavo_stacks = {}
    setattr(experts, name, _frozen(torch.empty(shape, dtype=schemes.FP8, device="meta")))
    experts.register_parameter(f"{name}_scale", _frozen(_meta_scale(shape, scheme, parts)))
    experts.octavo_stacks[name] = (scheme, parts)


@functools.cache
def _quantized_class(cls: type) -> type:
    return type(f"Quantized{cls.__name__}", (QuantizedExperts, cls), {})


def _refuse_casts(module: Any, fn: Any) -> None:
    """``model.to(dtype)`` would turn FP8 numbers into unscaled weights: raise instead. Moving to a device is fine."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype == schemes.FP8:
            if fn(parameter.new_empty(0)).dtype != schemes.FP8:
                raise TypeError("a model with FP8 weights can't be cast; give octavo.load the dtype for the rest of it")
            return


def scale_name(name: str) -> str:
    """The parameter that holds a quantized parameter's scale: ``a.weight`` -> ``a.weight_scale``."""
    return f"{name}_scale"


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, scheme, parts) of every quantized parameter."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedLinear):
            yield f"{prefix}weight", module.scheme, module.parts
        elif isinstance(module, QuantizedExperts):
            for name, (scheme, parts) in module.octavo_stacks.items():
                yield f"{prefix}{name}", scheme, parts


def _meta_scale(shape: tuple[int, ...], scheme: str, parts: tuple[int, ...]) -> Tensor:
    found = schemes.get(scheme)
    return torch.empty(found.scale_shape(shape, parts), dtype=found.scale_dtype, device="meta")


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
