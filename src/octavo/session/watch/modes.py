"""A loader, seen from below: every operation on a parameter that is loaded is told to the session.

Two modes of torch, active inside of a session and in its thread only. The *dispatch mode* sees each operation after all
Python of a loader is done: views of an item that has no storage are made on its meta twin, writes and reads are handed
to a `Receiver`. The *function mode* answers what never becomes an operation: the device of such a parameter, and
``parameter.data = tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...elements.operations import Operation, PlainDispatchMode, is_view, swapped, tensors_in, written
from ...errors import LoaderError
from ..inventory import Inventory
from ..parameters import Item

aten = torch.ops.aten
#: what gives a tensor all its values anew, without reading any
_FILLS = frozenset({aten.fill_, aten.zero_})
_RANDOM = frozenset(
    getattr(aten, f"{name}_")
    for name in ("normal", "uniform", "random", "bernoulli", "exponential", "cauchy", "geometric", "log_normal")
)
_SCATTERS = frozenset({aten.index_put_, aten.index_copy_, aten.index_fill_, aten.masked_fill_})
#: which of their arguments, after the tensor that they write, holds a value for each element
_VALUES = {aten.index_put_: 1, aten.index_copy_: 2}
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
#: what gives a tensor's memory to code that is not torch's
_ESCAPES = frozenset({torch.Tensor.numpy, torch.Tensor.data_ptr, torch.Tensor.__array__, torch.Tensor.__dlpack__})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


#: sets the elements of an integer tensor that an operation sets, to labels of the shape of its values, or to one
Mark = Callable[[Tensor, Tensor], None]


class Receiver(Protocol):
    """Takes what loaders do. Views are of the item's face, its twin, or its storage."""

    inventory: Inventory
    paused: bool  # everything passes

    def copy(self, item: Item, view: Tensor, values: Tensor) -> None:
        """``view.copy_(values)``"""

    def fill(self, item: Item, view: Tensor, run: Callable[[Tensor], Any]) -> None:
        """``view`` gets one value; ``run`` does it to a real view."""

    def scatter(
        self, item: Item, view: Tensor, values: Tensor | None, run: Callable[[Tensor], Any], mark: Mark
    ) -> None:
        """Some elements of ``view`` are set to those of ``values``, or to one value."""

    def copy_final(self, item: Item, final: Tensor, view: Tensor, values: Tensor) -> None:
        """``view.copy_(values)``, of the form that a finished item has got."""

    def touch_final(self, item: Item) -> None:
        """A loader reads, or changes in place, what a finished item became."""

    def overwrite(self, item: Item, view: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """All of ``view`` is about to be written, computed of ``inputs``: the real view to write to."""

    def generate(self, item: Item, view: Tensor) -> Tensor:
        """All of ``view`` is about to be written, computed of no tensor: the real view to write to."""

    def change(self, item: Item, view: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """``view`` is about to be changed in place, with ``inputs``: the real view."""

    def access(self, item: Item, view: Tensor) -> Tensor:
        """``view`` is about to be read, or changed in place: the real view."""

    def derived(self, items: Iterable[Item], others: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        """Tensors, none of which is an item's, were computed of items and others."""

    def device_of(self, item: Item) -> torch.device:
        """Where an item's storage goes."""

    def mutated(self, tensor: Tensor) -> None:
        """A tensor is about to be written."""

    def computed(self, done: Operation) -> None:
        """An operation in which no item took part."""

    def escaped(self, tensor: Tensor) -> None:
        """A tensor's memory goes to where no operation is seen."""


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
            elif func in _ESCAPES:
                self._receiver.escaped(args[0])
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
        made = func(*args, **kwargs)
        places = {id(tensor) for tensor in targets}
        others = [tensor for tensor in tensors if id(tensor) not in items and id(tensor) not in places]
        self._receiver.derived(items.values(), others, (*targets, *tensors_in(made)))
        return made

    def _final(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
        """Return True for a copy to a finished item, which is done. Raise for whatever would deal in FP8 numbers."""
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
        for tensor in targets if func.namespace == "aten" else inputs:  # others' schemas need not say what they write
            receiver.mutated(tensor)
        result = func(*args, **kwargs)
        receiver.computed(Operation(func, args, inputs, targets, tensors_in(result)))
        return result

    def _write(self, func: Any, args: Any, kwargs: Any, targets: Sequence[Tensor]) -> Any:
        receiver, find, packet = self._receiver, self._receiver.inventory.find, func.overloadpacket
        if packet is aten._foreach_copy_:
            for pair in zip(*args[:2], strict=True):
                self.__torch_dispatch__(aten.copy_.default, (), pair)
            return None
        if packet in (aten.cat, aten.stack):  # each of the tensors that it joins has rows of its own
            made = self.__torch_dispatch__(packet.default, (), args)
            _refuse_resizing(func, made.shape, kwargs["out"].shape)
            return self.__torch_dispatch__(aten.copy_.default, (), (kwargs["out"], made))
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
            at = _VALUES.get(packet, -1)
            values = rest[at] if 0 <= at < len(rest) else None
            receiver.scatter(item, target, values, lambda real: func(real, *rest, **kwargs), _marker(packet, rest))
            return target
        overwrites = packet in _RANDOM or "out" in func._overloadname
        places: dict[int, Tensor] = {}
        tensors = tensors_in((args, kwargs))
        inputs = [tensor for tensor in tensors if find(tensor) is None]
        generates = overwrites and all(any(tensor is other for other in targets) for tensor in tensors)
        for tensor in targets:
            if (found := find(tensor)) is not None:
                if generates:
                    places[id(tensor)] = receiver.generate(found, tensor)
                else:
                    places[id(tensor)] = (receiver.overwrite if overwrites else receiver.change)(found, tensor, inputs)

        def real(tensor: Tensor) -> Tensor:
            if id(tensor) in places:
                return places[id(tensor)]
            return tensor if (found := find(tensor)) is None else receiver.access(found, tensor)

        shapes = {id(tensor): tuple(tensor.shape) for tensor in places.values()}
        args, kwargs = swapped((args, kwargs), real)
        func(*args, **kwargs)
        for tensor in places.values():
            _refuse_resizing(func, tensor.shape, shapes[id(tensor)])
        return targets[0] if len(targets) == 1 else tuple(targets)


def _refuse_resizing(func: Any, shape: Sequence[int], present: Sequence[int]) -> None:
    if tuple(shape) != tuple(present):
        raise LoaderError(
            f"a loader computes {list(shape)} with {func} and out= a parameter, or a view of one, of "
            f"{list(present)}: torch would resize it"
        )


def _marker(packet: Any, rest: Sequence[Any]) -> Mark:
    def mark(mask: Tensor, labels: Tensor) -> None:
        there = swapped(list(rest[:2]), lambda tensor: tensor.cpu())
        if packet is aten.index_put_:
            mask.index_put_(tuple(there[0]), labels)
        elif packet is aten.masked_fill_:
            mask.masked_fill_(there[0], labels)
        elif labels.ndim:
            mask.index_copy_(there[0], there[1], labels)
        else:
            mask.index_fill_(there[0], there[1], labels)

    return mark


def _to_meta(kwargs: Any) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"
