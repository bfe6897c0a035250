"""A weight that reads as what its FP8 numbers and scales stand for.

Some code reads a weight by its name: it asks for the dtype, takes an expert's matrix out of a stack, multiplies by it.
`Widened` is what such code is given. It has the shape and dtype that the code expects, and no numbers. Views of it and
experts taken out of it are like it; products with it are those of `linear`, a matrix at a time. Any other operation is
given the values, widened for it and forgotten afterwards. Nothing can be written to it.
"""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import LoaderError
from ..numerics import schemes
from .linear import linear


@dataclass(frozen=True)
class Codes:
    """Numbers ``q``, as a scheme stores them, and scales ``[..., row cells, column cells]``, or ``[]`` of a matrix."""

    q: Tensor
    scale: Tensor
    scheme: str
    parts: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, in]."""
        return schemes.get(self.scheme).weight_shape(self.q.shape)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.q.shape[:-2])

    def at(self, key: Any) -> Codes:
        """The codes of a part of the leading axes."""
        return replace(self, q=_index(self.q, key), scale=_index(self.scale, key))

    def matrices(self) -> list[Codes]:
        """Each matrix, along one axis."""
        q = self.q.reshape(-1, *self.q.shape[-2:])
        scale = self.scale.reshape(len(q), *self.scale.shape[-2:])
        return [replace(self, q=q[i], scale=scale[i]) for i in range(len(q))]

    def values(self, dtype: torch.dtype) -> Tensor:
        """The numbers that these stand for."""
        if not self.lead:
            return schemes.dequantize(self.q, self.scale, self.scheme, self.parts, dtype)
        made = torch.empty(self.shape, dtype=dtype, device=self.q.device)
        for matrix, codes in zip(made.view(-1, *self.shape[-2:]), self.matrices(), strict=True):
            matrix.copy_(codes.values(dtype))
        return made

    def plain(self, dtype: torch.dtype, flipped: bool = False, shape: Sequence[int] | None = None) -> Tensor:
        """These numbers as they are read; see `Widened`."""
        made = self.values(dtype).mT if flipped else self.values(dtype)
        return made if shape is None else made.reshape(shape)


class Widened(Tensor):
    """Codes that read as a weight: ``[..., out, in]``, or ``[..., in, out]`` where they are ``flipped``.

    Args:
        shape: two axes, where a stack of matrices is read as one matrix of all their rows.
    """

    codes: Codes
    flipped: bool
    joined: bool

    @staticmethod
    def __new__(
        cls, codes: Codes, dtype: torch.dtype, flipped: bool = False, shape: Sequence[int] | None = None
    ) -> Widened:
        *lead, rows, cols = codes.shape
        stacked = (*lead, cols, rows) if flipped else (*lead, rows, cols)
        self: Widened = Tensor._make_wrapper_subclass(cls, tuple(shape or stacked), dtype=dtype, device=codes.q.device)
        self.codes, self.flipped, self.joined = codes, flipped, shape is not None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Widened({list(self.shape)}, {self.codes.scheme}, dtype={self.dtype})"

    def plain(self) -> Tensor:
        """Its values, as an ordinary tensor."""
        return self.codes.plain(self.dtype, self.flipped, self.shape)

    def like(self, codes: Codes, flipped: bool | None = None) -> Widened:
        """These codes, in the same dtype and direction."""
        return Widened(codes, self.dtype, self.flipped if flipped is None else flipped)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler, kwargs = _HANDLERS.get(func), kwargs or {}
        known = handler is not None and kwargs.keys() <= _KEYWORDS
        found = handler(*args, **kwargs) if handler is not None and known else NotImplemented
        if found is not NotImplemented:
            return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = (a for a, told in zip(args, func._schema.arguments, strict=False) if told.alias_info is not None)
        if func._schema.is_mutable and any(isinstance(a, Widened) for a in written):
            refuse_writing()
        args, kwargs = tree_map_only(Widened, Widened.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


class Values(Tensor):
    """The values of a weight for code that torch knows nothing of: they have memory, and can't be written either."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        if in_place or func in (Tensor.data.__set__, Tensor.__setitem__):
            refuse_writing()
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        return found.as_subclass(Values) if func == Tensor.data.__get__ else found


def refuse_writing(*_: Any) -> None:
    """Raise: whoever writes values would have to quantize them."""
    raise LoaderError(
        "a quantized weight can't be changed in place, nor an adapter be merged into it: it would be rounded once "
        "more. octavo.update quantizes new weights; merge an adapter into the bf16 checkpoint, and load that"
    )


def _index(tensor: Tensor, key: Any) -> Tensor:
    if tensor.dtype.itemsize == 1:  # torch does not gather FP8 numbers
        return tensor.view(torch.uint8)[key].view(tensor.dtype)
    return tensor[key]


# -- what is taken of a stack -----------------------------------------------------------------------------------------


def _getitem(weight: Any, key: Any) -> Any:
    if not isinstance(weight, Widened) or weight.joined:
        return NotImplemented
    keys = list(key) if isinstance(key, tuple) else [key]
    while keys and isinstance(keys[-1], slice) and keys[-1] == slice(None):
        keys.pop()
    taken = [k for k in keys if k is not None]
    if any(k is Ellipsis or isinstance(k, bool) for k in taken) or len(taken) > len(weight.codes.lead):
        return NotImplemented
    if any(isinstance(k, Tensor) and k.dtype == torch.bool and k.ndim != 1 for k in taken):
        return NotImplemented
    return weight.like(weight.codes.at(tuple(keys)))


def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    whole = isinstance(weight, Widened) and not weight.joined and len(weight.codes.lead) == 1 and dim == 0
    return weight.like(weight.codes.at(index)) if whole else NotImplemented


def _unsqueeze(weight: Any, dim: int) -> Any:
    if not isinstance(weight, Widened) or weight.joined or not 0 <= dim <= len(weight.codes.lead):
        return NotImplemented
    return weight.like(weight.codes.at((*[slice(None)] * dim, None)))


def _unbind(weight: Any, dim: int = 0) -> Any:
    if not isinstance(weight, Widened) or weight.joined or not weight.codes.lead or dim != 0:
        return NotImplemented
    return tuple(weight[i] for i in range(len(weight)))


def _transpose(weight: Any, a: int, b: int) -> Any:
    if not isinstance(weight, Widened) or weight.joined or {a % weight.ndim, b % weight.ndim} != _last_two(weight):
        return NotImplemented
    return weight.like(weight.codes, not weight.flipped)


def _flip(weight: Any) -> Any:
    return _transpose(weight, -1, -2) if isinstance(weight, Widened) and weight.ndim == 2 else NotImplemented


def _flip_each(weight: Any) -> Any:
    return _transpose(weight, -1, -2)


def _permute(weight: Any, *dims: Any) -> Any:
    order = list(dims[0]) if dims and not isinstance(dims[0], int) else list(dims)
    if not isinstance(weight, Widened) or [d % weight.ndim for d in order] != _swapped(weight.ndim):
        return NotImplemented
    return _transpose(weight, -1, -2)


def _last_two(weight: Tensor) -> set[int]:
    return {weight.ndim - 2, weight.ndim - 1}


def _swapped(ndim: int) -> list[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]


def _view(weight: Any, *shape: Any) -> Any:
    """One matrix of all rows, taken apart again."""
    if not isinstance(weight, Widened) or not weight.joined:
        return NotImplemented
    wanted = list(shape[0]) if shape and not isinstance(shape[0], int) else list(shape)
    apart = weight.like(weight.codes)
    if wanted.count(-1) == 1:
        rest = -math.prod(wanted)
        wanted[wanted.index(-1)] = apart.numel() // rest if rest else 0
    return apart if tuple(wanted) == tuple(apart.shape) else NotImplemented


def _itself(weight: Any, *_: Any, **__: Any) -> Any:
    return weight


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """A change of the dtype alone; the values go to another device, and codes to meta: who lends weights keeps them."""
    kwargs.pop("non_blocking", None)
    given = [*args, *kwargs.values()]
    if isinstance(weight, Widened) and len(given) == 1 and given[0] in ("meta", torch.device("meta")):
        return weight.codes.q.to("meta")
    if not isinstance(weight, Widened) or len(given) != 1 or not isinstance(given[0], torch.dtype) or weight.joined:
        return NotImplemented
    return Widened(weight.codes, given[0], weight.flipped)


# -- products ---------------------------------------------------------------------------------------------------------


def _product(x: Tensor, codes: Codes, across: bool, bias: Tensor | None = None) -> Tensor:
    """``x[..., in] @ codes.T``; ``x[..., out] @ codes`` where it goes ``across``."""
    if not across:
        return linear(x, codes.q, codes.scale, codes.scheme, codes.parts, bias)
    made = x @ codes.values(x.dtype)
    return made if bias is None else made + bias


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, Widened) or not isinstance(weight, Widened) or weight.ndim != 2 or weight.joined:
        return NotImplemented
    return _product(x, weight.codes, weight.flipped, bias)


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, Widened) or not isinstance(weight, Widened) or weight.joined:
        return NotImplemented
    codes, across = weight.codes, not weight.flipped
    wide = [axis for axis, length in enumerate(codes.lead) if length != 1]
    if len(wide) > 1 or (x.ndim < 2 and codes.lead):
        return NotImplemented
    batch = torch.broadcast_shapes(x.shape[:-2], codes.lead)  # type: ignore[no-untyped-call]
    if not wide:
        made = _product(x, codes.matrices()[0] if codes.lead else codes, across)
        return made.reshape(*batch, *made.shape[-2:]) if codes.lead else made
    axis = wide[0] - len(codes.lead) - 2
    x = x.expand(*batch, *x.shape[-2:])
    each = [_product(x.select(axis, i), matrix, across) for i, matrix in enumerate(codes.matrices())]
    return torch.stack(each, axis)


_KEYWORDS = {"weight", "bias", "dim", "index", "dtype", "device", "non_blocking"}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: refuse_writing,
    Tensor.index_select: _index_select,
    torch.index_select: _index_select,
    Tensor.unsqueeze: _unsqueeze,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.t: _flip,
    torch.t: _flip,
    Tensor.T.__get__: _flip,
    Tensor.mT.__get__: _flip_each,
    Tensor.permute: _permute,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.contiguous: _itself,
    Tensor.detach: _itself,
    Tensor.data.__get__: _itself,
    Tensor.data.__set__: refuse_writing,
    Tensor.to: _to,
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.bmm: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.bmm: _matmul,
    Tensor.mm: _matmul,
}
