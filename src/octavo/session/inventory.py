"""The parameters and buffers of a model, found by name, by module, and by any tensor that is a view of them."""

from __future__ import annotations

import bisect
import fnmatch
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..elements.operations import offset_of, storage_key
from ..errors import CoverageError
from .parameters import Face, Item, Layer


class Inventory:
    """All layers and items of a model, and which of them a tensor is a view of.

    Args:
        device: where storage goes; default: where the parameters are, the CPU for those on meta.
        optional: patterns of parameters whose values are right when no tensor comes.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | None = None, optional: str | Iterable[str] = ()
    ) -> None:
        self.model, self._device = model, device
        self._optional = (optional,) if isinstance(optional, str) else tuple(optional)
        self.layers: list[Layer] = []
        self.items: list[Item] = []
        self._by_face: dict[int, tuple[Item, Any]] = {}  # by address; the weak reference tells whose it is now
        self._by_place: dict[Any, Item] | None = {}  # storages that parameters share, while the model is walked
        self._by_storage: dict[int, list[tuple[Item, Any]]] = {}
        self._finals: dict[int, tuple[Item, Tensor]] = {}  # FP8 numbers and scales in their modules, by storage
        for path, module in model.named_modules():
            held = [*module._parameters.items(), *module._buffers.items()]
            if any(tensor is not None for _, tensor in held):
                layer = Layer(path, module)
                self.layers.append(layer)
                for leaf, tensor in held:
                    if tensor is not None:
                        self.add(layer, leaf, tensor)
        self._by_place = None

    def add(self, layer: Layer, leaf: str, tensor: Tensor) -> Item | None:
        """A parameter or buffer of a layer; None for one that is known already, under another name."""
        face = Face(layer.module, leaf, tensor)
        place = (storage_key(tensor), offset_of(tensor), tuple(tensor.shape), tuple(tensor.stride()))
        known = self._of_face(tensor) or (self._by_place.get(place) if self._by_place and tensor.numel() else None)
        if known is not None:
            self._by_face[id(tensor)] = known, weakref.ref(tensor)
            known.faces.append(face)
            if layer not in known.layers:
                known.layers.append(layer)
                layer.items.append(known)
            return None
        item = Item(
            name=f"{layer.name}.{leaf}" if layer.name else leaf,
            faces=[face],
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            offset=offset_of(tensor),
            dtype=tensor.dtype,
            is_buffer=leaf in layer.module._buffers,
            device=self._device or (torch.device("cpu") if tensor.is_meta else tensor.device),
            layers=[layer],
        )
        self.items.append(item)
        layer.items.append(item)
        self._by_face[id(tensor)] = item, weakref.ref(tensor)
        if self._by_place is not None:
            self._by_place[place] = item
        return item

    def _of_face(self, tensor: Tensor) -> Item | None:
        found = self._by_face.get(id(tensor))
        return found[0] if found is not None and found[1]() is tensor else None

    def is_optional(self, item: Item) -> bool:
        return any(fnmatch.fnmatchcase(item.name, pattern) for pattern in self._optional)

    def require(self) -> None:
        """Whatever is not optional has to come; of buffers, those that have no values yet."""
        for pattern in self._optional:
            if not any(fnmatch.fnmatchcase(item.name, pattern) for item in self.items):
                raise CoverageError(f"the optional pattern {pattern!r} matches no parameter")
        for item in self.items:
            item.required = not self.is_optional(item) and (not item.is_buffer or item.faces[0].tensor.is_meta)

    def drop(self, names: Collection[str]) -> None:
        """Pass over parameters that nobody loads."""
        self.items = [item for item in self.items if item.name not in names]
        self._by_face = {key: found for key, found in self._by_face.items() if found[0].name not in names}
        for layer in self.layers:
            layer.items = [item for item in layer.items if item.name not in names]

    def by_name(self) -> dict[str, Item]:
        """Items by all of their names."""
        found = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and (item := self._of_face(tensor)) is not None:
                    found[f"{path}.{leaf}" if path else leaf] = item
        return found

    def layer_of(self, module: nn.Module) -> Layer | None:
        """The layer of a module; a new one for a module of the model that had no parameter; None for a stranger."""
        for layer in self.layers:
            if layer.module is module and not layer.late:
                return layer
        for path, found in self.model.named_modules():
            if found is module:
                self.layers.append(Layer(path, module))
                return self.layers[-1]
        return None

    def track(self, item: Item, tensor: Tensor) -> None:
        """Recognise views of a tensor from now on, as long as its storage lives."""
        key = storage_key(tensor)
        if key is not None:
            # the weak reference keeps the address from being used again
            reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            bisect.insort(self._by_storage.setdefault(key, []), (item, reference), key=_begin)

    def track_final(self, item: Item, tensor: Tensor) -> None:
        """Recognise what a finished item became: its values are not those that loaders deal in."""
        if (key := storage_key(tensor)) is not None:
            self._finals[key] = item, tensor

    @property
    def has_finals(self) -> bool:
        return bool(self._finals)

    def find_final(self, tensor: Any) -> tuple[Item, Tensor] | None:
        """The item whose FP8 numbers or scales a tensor is a view of, and the whole of them."""
        if not self._finals or not isinstance(tensor, Tensor) or (key := storage_key(tensor)) is None:
            return None
        return self._finals.get(key)

    def untrack(self) -> None:
        self._by_storage.clear()
        self._finals.clear()

    def find(self, tensor: Any) -> Item | None:
        """The item that a tensor is a view of."""
        if not isinstance(tensor, Tensor) or (key := storage_key(tensor)) is None:
            return None
        found = self._by_storage.get(key)
        if not found:
            return None
        if len(found) > 1:  # parameters that are slices of one storage
            at = offset_of(tensor) * tensor.dtype.itemsize
            for number in range(bisect.bisect_right(found, at, key=_begin) - 1, -1, -1):
                item = found[number][0]
                if at < _begin(found[number]) + max(item.nbytes, 1):
                    return item
        return found[0][0]


def _begin(tracked: tuple[Item, Any]) -> int:
    """Where a tracked item begins in its storage, in bytes."""
    return tracked[0].offset * tracked[0].dtype.itemsize
