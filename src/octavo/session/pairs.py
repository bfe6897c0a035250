"""Pairs of names and tensors on their way to a loader, and the plainest of loaders."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CoverageError, LoaderError
from .intake import Intake
from .parameters import Layer

Pair = tuple[str, Tensor]
#: sees each pair before the loader: returns what takes its place (a pair, or several), or None to drop it
Transform = Callable[[str, Tensor], Pair | Iterable[Pair] | None]


_AT_REST: tuple[type, ...] = (list, tuple, type({}.items()), type(OrderedDict().items()))
#: pairs that are taken apart without running code
_PLAIN = (tuple.__iter__, list.__iter__)


class Pairs(Iterator[Pair]):
    """Pairs, through a transform; tells the intake where one ends and the next begins."""

    def __init__(self, intake: Intake, pairs: Iterable[Pair], transform: Transform | None) -> None:
        self._intake, self._pairs, self._transform = intake, iter(pairs), transform
        self._ready: list[Pair] = []
        #: where no code runs between two pairs, nobody changes a tensor meanwhile
        self.at_rest = transform is None and type(pairs) in _AT_REST

    def __next__(self) -> Pair:
        if self._intake.closed:
            raise LoaderError(
                "these pairs are a session's that has been left, and nobody would see where they go: let the loader "
                "use them up within `with session:`"
            )
        self._intake.turn()
        if not self.at_rest:
            self._intake.settle()
        while not self._ready:
            given = next(self._pairs)
            if self.at_rest and getattr(type(given), "__iter__", None) not in _PLAIN:
                self.at_rest = False
                self._intake.settle()
            name, tensor = given
            if self._transform is None:
                self._ready = [(name, tensor)]
                break
            with self._intake.quiet():
                self._ready = transformed(self._transform, name, tensor)
        pair = self._ready.pop(0)
        self._intake.take(*pair)
        return pair


def transformed(transform: Transform | None, name: str, tensor: Tensor) -> list[Pair]:
    """The pairs that take a pair's place."""
    if transform is None:
        return [(name, tensor)]
    made = transform(name, tensor)
    if made is None:
        return []
    one = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], str)
    return [made] if one else list(made)  # type: ignore[list-item, arg-type]


def load_by_name(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Each tensor to the parameter or buffer of its name, by its ``weight_loader`` or by a copy."""
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in pairs:
        if name not in targets:
            raise CoverageError(f"{name}: the model has no such parameter. Rename or drop it in a transform.")
        target = targets[name]
        loader = getattr(target, "weight_loader", None)
        if loader is not None:
            loader(target, tensor)
        elif target.shape != tensor.shape:
            raise CoverageError(f"{name} is {list(target.shape)} in the model, {list(tensor.shape)} in the source")
        else:
            target.data.copy_(tensor)


@contextlib.contextmanager
def load_weights_by(model: nn.Module, pairs: Callable[[Iterable[Pair]], Pairs]) -> Iterator[None]:
    """Meanwhile, ``model.load_weights``, if there is one, reads what ``pairs`` makes of the pairs that it is given."""
    attributes, name = model.__dict__, "load_weights"
    original = getattr(model, name, None)
    if not callable(original):
        yield
        return
    before = {name: attributes[name]} if name in attributes else {}

    def load_weights(given: Iterable[Pair], *args: Any, **kwargs: Any) -> Any:
        return original(given if isinstance(given, Pairs) else pairs(given), *args, **kwargs)

    attributes[name] = load_weights
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def dummy(layers: Iterable[Layer], seed: int) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Random values for what is still to come, matrix by matrix: where they go, their name, and they themselves."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for item in (item for layer in layers for item in layer.items if item.required and item.gaps):
        target = item.faces[0].tensor.detach()
        for index in itertools.product(*map(range, item.shape[:-2])):
            shape = item.shape[len(index) :]
            values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.02
            yield target[index] if index else target, item.name, values.to(item.dtype)
