"""Pairs of names and tensors on their way to a loader, and the plainest of loaders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from ..errors import CoverageError
from .writes import Writes

Pair = tuple[str, Tensor]
#: sees each pair before the loader: returns what takes its place (a pair, or several), or None to drop it
Transform = Callable[[str, Tensor], Pair | Iterable[Pair] | None]


_AT_REST: tuple[type, ...] = (list, tuple, type({}.items()), type(OrderedDict().items()))
#: pairs that are taken apart without running code
_PLAIN = (tuple.__iter__, list.__iter__)


class Pairs(Iterator[Pair]):
    """Pairs, through a transform; tells the session where one ends and the next begins."""

    def __init__(self, writes: Writes, pairs: Iterable[Pair], transform: Transform | None) -> None:
        self._writes, self._pairs, self._transform = writes, iter(pairs), transform
        self._ready: list[Pair] = []
        #: where no code runs between two pairs, nobody changes a tensor meanwhile
        self.at_rest = transform is None and type(pairs) in _AT_REST

    def __next__(self) -> Pair:
        self._writes.turn()
        if not self.at_rest:
            self._writes.intake.quantizer.settle()
        while not self._ready:
            given = next(self._pairs)
            if self.at_rest and getattr(type(given), "__iter__", None) not in _PLAIN:
                self.at_rest = False
                self._writes.intake.quantizer.settle()
            name, tensor = given
            if self._transform is None:
                self._ready = [(name, tensor)]
                break
            with self._writes.quiet():
                self._ready = transformed(self._transform, name, tensor)
        pair = self._ready.pop(0)
        self._writes.take(*pair)
        return pair


def transformed(transform: Transform | None, name: str, tensor: Tensor) -> list[Pair]:
    """What takes a pair's place."""
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
