"""What a loader does, seen from below: every operation on a parameter that is loaded, told to the session.

Two modes of torch, active inside of a session and in its thread only. The *dispatch mode* sees each operation after all
Python of a loader is done: views of an item that has no storage are made on its meta twin, writes and reads are handed
to a `Receiver`. The *function mode* answers what never becomes an operation: the device of such a parameter, and
``parameter.data = tensor``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..errors import LoaderError
from .items import Inventory, Item

aten = torch.ops.aten
#: what gives a tensor all its values anew, without reading any
_FILLS = frozenset({aten.fill_, aten.zero_})
_RANDOM = frozenset({aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_, aten.exponential_})
_SCATTERS = frozenset({aten.index_put_, aten.index_copy_, aten.index_fill_, aten.masked_fill_})
#: new tensors like a given one, of which only shape, dtype and device matter
_FACTORIES = frozenset(
    getattr(aten, name)
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)
_ANSWERS: dict[str, Callable[[torch.device], Any]] = {
    "device": lambda device: device,
    "is_meta": lambda device: False,
    "is_cpu": lambda device: device.type == "cpu",
    "is_cuda": lambda device: device.type == "cuda",
}
_GETTERS = {getattr(torch.Tensor, name).__get__: answer for name, answer in _ANSWERS.items()}
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Operations within are plain: a mode that lets one pass takes longer than the operation."""
    if not torch._C._len_torch_dispatch_stack():  # nobody follows them
        yield
        return
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class Receiver(Protocol):
    """Takes what loaders do. Views are of the item's face, its twin, or its storage."""

    inventory: Inventory
    paused: bool  # everything passes

    def copy(self, item: Item, view: Tensor, values: Tensor) -> None:
        """``view.copy_(values)``"""

    def fill(self, item: Item, view: Tensor, run: Callable[[Tensor], Any]) -> None:
        """``view`` gets one value; ``run`` does it to a real view."""

    def scatter(self, item: Item, view: Tensor, run: Callable[[Tensor], Any], mark: Callable[[Tensor], Any]) -> None:
        """Some elements of ``view`` are set; ``mark`` sets the same elements of a boolean tensor to true."""

    def copy_final(self, item: Item, final: Tensor, view: Tensor, values: Tensor) -> None:
        """``view.copy_(values)``, of the form that a finished item has got."""

    def touch_final(self, item: Item) -> None:
        """A loader reads, or changes in place, what a finished item became."""

    def overwrite(self, item: Item, view: Tensor) -> Tensor:
        """All of ``view`` is about to be written: the real view to write to."""

    def access(self, item: Item, view: Tensor) -> Tensor:
        """``view`` is about to be read, or changed in place: the real view."""

    def device_of(self, item: Item) -> torch.device:
        """Where an item's storage goes."""

    def derived(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Some operation made tensors of others."""

    def joined(self, tensors: Sequence[Tensor], dim: int, result: Tensor) -> None:
        """``torch.cat``."""

    def mutated(self, tensor: Tensor) -> None:
        """A tensor is about to be written."""

    def rewritten(self, tensor: Tensor, values: Sequence[Tensor]) -> None:
        """A tensor that is no item's was written, with these taking part."""


class Functions(TorchFunctionMode):
    """Answers questions about tensors without storage."""

    def __init__(self, receiver: Receiver) -> None:
        super().__init__()
        self._receiver = receiver

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._receiver.paused:
            if (answer := _GETTERS.get(func)) is not None:
                item = self._receiver.inventory.find(args[0])
                if item is not None and item.virtual:
                    return answer(self._receiver.device_of(item))
            elif func == _SET_DATA:
                inventory = self._receiver.inventory
                item, final = inventory.find(args[0]), inventory.find_final(args[0])
                if item is None and final is not None:
                    item = final[0]
                if item is not None and (item.virtual or item.settled) and isinstance(args[1], Tensor):
                    # the loader wants the tensor to become the parameter's: it is copied instead
                    if args[0].shape != args[1].shape:
                        raise LoaderError(
                            f"{item.name} {list(args[0].shape)}: a loader puts a tensor of another shape in its place, "
                            f"{list(args[1].shape)}"
                        )
                    torch.Tensor.copy_(args[0].detach(), args[1])
                    return None
        return func(*args, **kwargs)


class PlainDispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Without torch's wrapper, whose first call imports the compiler: a second and 100 MiB, for nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Operations(PlainDispatchMode):
    """Hands operations on items to the receiver; lets all others pass."""

    def __init__(self, receiver: Receiver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._receiver = receiver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._receiver.paused:
            return func(*args, **kwargs)
        find = self._receiver.inventory.find
        tensors = tensors_in((args, kwargs))
        if self._receiver.inventory.has_finals and self._final(func, args, kwargs, tensors):
            return args[0]
        items = {id(tensor): item for tensor in tensors if (item := find(tensor)) is not None}
        if not items:
            return self._other(func, args, kwargs, tensors)
        targets = written(func, args, kwargs)
        if any(id(tensor) in items for tensor in targets):
            return self._write(func, args, kwargs, targets)
        if func.overloadpacket in _FACTORIES:
            device = self._receiver.device_of(next(iter(items.values())))
            return func(*args, **{**kwargs, "device": kwargs.get("device") or device})
        if is_view(func):

            def moved(tensor: Tensor) -> Tensor:
                item = items.get(id(tensor))
                return tensor if item is None or not item.virtual else item.on_twin(tensor)

            args, kwargs = swapped((args, kwargs), moved)
            return func(*args, **kwargs)

        def real(tensor: Tensor) -> Tensor:
            item = items.get(id(tensor))
            return tensor if item is None else self._receiver.access(item, tensor)

        args, kwargs = swapped((args, kwargs), real)
        if _to_meta(kwargs):
            kwargs = {**kwargs, "device": next(iter(items.values())).device}
        return func(*args, **kwargs)

    def _final(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
        """Whether this was a copy to a finished item, which is done. Raises for what would deal in its FP8 numbers."""
        receiver, find = self._receiver, self._receiver.inventory.find_final
        finals = {id(tensor): final for tensor in tensors if (final := find(tensor)) is not None}
        if not finals or is_view(func) or func.overloadpacket in _FACTORIES:
            return False
        if func.overloadpacket is aten.copy_ and id(args[0]) in finals and id(args[1]) not in finals:
            values = args[1]
            if (source := receiver.inventory.find(values)) is not None:
                values = receiver.access(source, values)
            receiver.copy_final(*finals[id(args[0])], args[0], values)
            return True
        receiver.touch_final(next(iter(finals.values()))[0])
        return False

    def _other(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """No item takes part. Copies to the device of a parameter without storage keep their data."""
        receiver = self._receiver
        to_meta = func.overloadpacket in (aten._to_copy, aten.scalar_tensor) and _to_meta(kwargs)
        if to_meta and not any(tensor.is_meta for tensor in inputs):
            kwargs = {**kwargs, "device": inputs[0].device if inputs else torch.device("cpu")}
        targets = written(func, args, kwargs)
        for tensor in targets:
            receiver.mutated(tensor)
        result = func(*args, **kwargs)
        for tensor in targets:
            receiver.rewritten(tensor, [other for other in inputs if other is not tensor])
        if func.overloadpacket is aten.cat:
            receiver.joined(inputs, args[1] if len(args) > 1 else 0, result)
        receiver.derived(inputs, tensors_in(result) if inputs else ())
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, targets: Sequence[Tensor]) -> Any:
        receiver, find, packet = self._receiver, self._receiver.inventory.find, func.overloadpacket
        target: Any = args[0] if args else None
        item = find(target)
        for tensor in targets:  # a buffer of the model may be on its way to a parameter
            receiver.mutated(tensor)
        if packet is aten.copy_ and item is not None:
            values = args[1]
            if (source := find(values)) is not None:
                values = receiver.access(source, values)
            receiver.copy(item, target, values)
            return target
        rest = [receiver.access(i, a) if (i := find(a)) is not None else a for a in args[1:]]
        if packet in _FILLS and item is not None:
            receiver.fill(item, target, lambda real: func(real, *rest, **kwargs))
            return target
        adds = packet is aten.index_put_ and bool(args[3] if len(args) > 3 else kwargs.get("accumulate"))
        if packet in _SCATTERS and item is not None and not adds:
            receiver.scatter(item, target, lambda real: func(real, *rest, **kwargs), _marker(packet, rest))
            return target
        overwrites = packet in _RANDOM or "out" in func._overloadname
        places: dict[int, Tensor] = {}
        for tensor in targets:
            if (found := find(tensor)) is not None:
                places[id(tensor)] = (receiver.overwrite if overwrites else receiver.access)(found, tensor)

        def real(tensor: Tensor) -> Tensor:
            if id(tensor) in places:
                return places[id(tensor)]
            return tensor if (found := find(tensor)) is None else receiver.access(found, tensor)

        shapes = {id(tensor): tuple(tensor.shape) for tensor in places.values()}
        args, kwargs = swapped((args, kwargs), real)
        func(*args, **kwargs)
        for tensor in places.values():
            if tuple(tensor.shape) != shapes[id(tensor)]:
                raise LoaderError(
                    f"a loader computes {list(tensor.shape)} with {func} and out= a parameter, or a view of one, of "
                    f"{list(shapes[id(tensor)])}: torch would resize it"
                )
        return targets[0] if len(targets) == 1 else tuple(targets)


def _marker(packet: Any, rest: Sequence[Any]) -> Callable[[Tensor], Any]:
    yes = torch.ones((), dtype=torch.bool, device="cpu")
    rest = swapped(list(rest), lambda tensor: tensor.cpu())
    if packet is aten.index_put_:
        return lambda mask: mask.index_put_(tuple(rest[0]), yes)
    if packet is aten.masked_fill_:
        return lambda mask: mask.masked_fill_(rest[0], True)
    return lambda mask: mask.index_fill_(rest[0], rest[1], True)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among an operation's arguments or results (torch's own tree functions take several times longer)."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += tensors_in(value)
    return found


def swapped(values: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with other tensors in their places."""
    if isinstance(values, Tensor):
        return swap(values)
    if isinstance(values, dict):
        return {key: swapped(value, swap) for key, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(swapped(value, swap) for value in values)
    return values


def _to_meta(kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def is_view(func: Any) -> bool:
    """Whether results share the memory of an argument that is not written."""
    if func.overloadpacket is aten._unsafe_view:
        return True
    schema = func._schema
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return False
    return any(r.alias_info is not None for r in schema.returns)


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [value] if isinstance(value, Tensor) else [v for v in value or () if isinstance(v, Tensor)]
    return found
