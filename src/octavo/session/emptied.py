"""Parameters that gave their memory back for a session: whoever reads or writes them meanwhile must not crash.

The session's own thread is followed, and meets twins instead. Other threads, and code that is not torch's, meet the
parameters themselves. On a CPU these get addresses then, behind which there is memory only once somebody touches it:
what is written there is lost, and told at the end. On an accelerator, where no memory is to be had for nothing, a
thread that writes there ends in an error of the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import LoaderError
from ..machine import resident_pages
from .inventory import Inventory
from .parameters import Item

_PAGE = mmap.PAGESIZE
#: addresses that a thread has used which nobody knows: it may go on with them
_kept: list[mmap.mmap] = []


class Emptied:
    """The parameters of one session that are without memory."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._memory: mmap.mmap | None = None
        self._places: list[tuple[str, int, int]] = []  # name, and its first page and the one behind its last
        self._tells = False

    def empty(self, inventory: Inventory, items: Iterable[Item]) -> None:
        """Have items give their memory back."""
        at, slots = 0, []
        for item in items:
            self._tensors += [face.tensor for face in item.faces]
            if item.nbytes and all(face.tensor.device.type == "cpu" for face in item.faces):
                slots.append((item, at))
                at += -(-item.nbytes // _PAGE)
            else:
                item.give_back()
        if slots:
            self._memory = _reserve(at * _PAGE)
            self._tells = self._memory is not None and not any(_resident(self._memory))
        for item, page in slots:
            if self._memory is None:
                item.give_back()
                continue
            self._places.append((item.name, page, page - (-item.nbytes // _PAGE)))
            flat = torch.frombuffer(self._memory, dtype=item.dtype, count=item.numel, offset=page * _PAGE)
            place = flat.as_strided(item.shape, item.strides)
            for face in item.faces:
                _move(face.tensor, place)
                inventory.track(item, face.tensor)

    def check(self) -> None:
        """Raise if somebody has read or written parameters behind the session's back.

        Raises:
            LoaderError: naming them.
        """
        if self._memory is None or not self._tells:
            return
        resident = _resident(self._memory)
        names = [name for name, first, end in self._places if any(resident[first:end])]
        if not names:
            return
        _kept.append(self._memory)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        raise LoaderError(
            f"{', '.join(names[:4])}{more}: read or written where the session does not see it, by another thread or by "
            "code that is not torch's, while no memory was there. Let the thread that entered the session load."
        )

    def close(self) -> None:
        """Let those that got no memory read as what is no weights: NaN, or 0 where there is none."""
        for tensor in self._tensors:
            if tensor.numel() and not tensor.is_meta and self._is_empty(tensor):
                nothing = torch.full((), math.nan if tensor.is_floating_point() else 0)
                tensor.data = nothing.to(tensor).expand(tensor.shape)

    def _is_empty(self, tensor: Tensor) -> bool:
        if self._memory is None or tensor.device.type != "cpu":
            return not tensor.untyped_storage().nbytes()
        return 0 <= tensor.data_ptr() - _address(self._memory) < len(self._memory)


def _reserve(nbytes: int) -> mmap.mmap | None:
    """Addresses without memory; None where they are not to be had."""
    flags = [getattr(mmap, f"MAP_{name}", None) for name in ("PRIVATE", "ANONYMOUS")]
    if None in flags:
        return None
    private, anonymous = flags
    try:
        memory = mmap.mmap(-1, nbytes, flags=private | anonymous | getattr(mmap, "MAP_NORESERVE", 0))  # type: ignore[operator]
    except (OSError, ValueError, OverflowError):
        return None
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # or who touches one parameter seems to touch those beside it
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _resident(memory: mmap.mmap) -> bytes:
    """A byte for each page, which is not 0 where there is memory; one such byte where the system does not tell."""
    try:
        return resident_pages(_address(memory), len(memory))
    except OSError:
        return b"\1"


def _move(tensor: Tensor, place: Tensor) -> None:
    """A tensor has its values in another place, and its memory is free; others that see it stay readable."""
    nbytes, before = tensor.untyped_storage().nbytes(), StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    tensor.data = place
    if before.expired():  # type: ignore[no-untyped-call]
        return
    others = torch.UntypedStorage._new_with_weak_ptr(before.cdata)
    if others is not None and others.data_ptr() != place.data_ptr() and others.resizable():
        others.resize_(0)
        others.resize_(nbytes)
