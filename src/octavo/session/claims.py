"""Which models have a session or an update: no other may touch a module or a parameter of theirs meanwhile.

Two that follow one parameter would each think that its values are elsewhere. That holds for parts of a model, for
models that it is a part of, and for those that share parameters with it, in whatever thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from ..elements.operations import storage_key
from ..errors import LoaderError
from .inventory import Inventory

#: modules, parameters and storages, by address -> the inventory whose they are. `dict.setdefault` needs no lock
_owners: dict[int, Inventory] = {}


@contextlib.contextmanager
def claimed(inventory: Inventory) -> Iterator[None]:
    """The model of an inventory is its alone until this is left.

    Raises:
        LoaderError: it has a session already, or shares modules or parameters with a model that has.
    """
    held: dict[int, Any] = {}  # keeps addresses from being used again
    for path, module in inventory.model.named_modules():
        held[id(module)] = module, path
    for item in inventory.items:
        for face in item.faces:
            held[id(face.tensor)] = face.tensor, item.name
            if (key := storage_key(face.tensor)) is not None:
                # a weak one: the memory itself may go
                held[key] = StorageWeakRef(face.tensor.untyped_storage()), item.name  # type: ignore[no-untyped-call]
    mine: list[int] = []
    try:
        for address, (_, name) in held.items():
            owner = _owners.setdefault(address, inventory)
            if owner is not inventory:
                kind = type(owner.model).__name__
                if owner.model is inventory.model:
                    raise LoaderError(
                        f"this {kind} has a session already, or an update that is under way, in this thread or in "
                        "another. Let that one end first."
                    )
                raise LoaderError(
                    f"{name or type(inventory.model).__name__}: belongs to a {kind} that another session or update is "
                    "busy with. Leave that one first, or let one session have the whole model."
                )
            mine.append(address)
        yield
    finally:
        for address in mine:
            del _owners[address]
