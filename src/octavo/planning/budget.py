"""The staging budget, divided into threads, slots and scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeviceError
from ..machine import PAGE, usable_cpus
from ..memory import require
from .chunks import default_slot_bytes
from .placement import Placement

MIN_STAGING_BYTES = 1 << 20
#: elements of a tile on a CPU: so many stay in a core's cache
TILE_ELEMENTS = 1 << 19
#: slots on an accelerator: one for each thread, large enough to hide the cost of launching copies and kernels
_PINNED_SLOT_BYTES = 16 << 20
#: slots of this size or more have room for aligning reads past the page cache
_ALIGNED_SLOT_BYTES = 64 * PAGE
_MAX_THREADS = 16
#: that measure, wait for the disk, or prepare a device
_OTHER_THREADS = 2
#: lanes of an accelerator
_LANES = 2
#: slots that make a block
_BLOCK_SLOTS = 6
#: slots whose size a lane takes: a block, and what quantizing needs beside it
_LANE_SLOTS = 8
#: where sources are quantized already: slots that make a block, and what of them is decoded at once, in float32
_CODED_SLOTS, _DECODED_SLOTS = 3, 2
#: the smallest slot, where many threads are asked for with a small budget
_MIN_SLOT_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Budget:
    """``staging_bytes``, divided: so many threads, slots of such a size, so much scratch memory.

    Several accelerators share threads and slots; each has lanes of its own.
    """

    threads: int
    slots: int
    slot_bytes: int
    scratch_elements: int
    device: torch.device  # or the first of several
    lanes: int = 0  # on a GPU: streams that copy and quantize at the same time; 0: threads do it, on a CPU
    block_bytes: int = 0  # what is copied and quantized at once
    lane_bytes: int = 0  # a block, and what kernels need beside it

    @property
    def read_bytes(self) -> int:
        """The most bytes that are read into a slot at once. Large slots leave room for aligning direct reads."""
        return self.slot_bytes - 2 * PAGE if self.slot_bytes >= _ALIGNED_SLOT_BYTES else self.slot_bytes

    @property
    def chunk_bytes(self) -> int:
        """The largest chunk."""
        return self.block_bytes if self.lanes else self.slot_bytes

    @property
    def host_bytes(self) -> int:
        """Slots and, on a CPU, scratch and FP8 output: at most half a slot, since sources have two bytes or more."""
        scratch = self.slot_bytes // 2 + self.scratch_elements * 8 if self.device.type == "cpu" else 0
        return self.slots * self.slot_bytes + self.threads * scratch

    @property
    def device_bytes(self) -> int:
        """On each accelerator."""
        return self.lanes * self.lane_bytes

    @property
    def staging_bytes(self) -> int:
        """On the host or the device, whichever is more."""
        return max(self.host_bytes, self.device_bytes)

    def require(self, subject: object, placed_bytes: int = 0, advice: str = "") -> None:
        """Raise unless the host has the memory that this takes beside ``placed_bytes``.

        Raises:
            DeviceError: it has not; says how much is needed, how much there is, and what limits it.
        """
        less = "A smaller staging_bytes, or fewer threads, need less."
        require(placed_bytes + self.host_bytes, self.threads + _OTHER_THREADS, subject, advice or less)

    @classmethod
    def fit(
        cls,
        placements: Sequence[Placement],
        staging_bytes: int,
        threads: int | None = None,
        slot_bytes: int | None = None,
        *,
        handing_out: bool = False,
    ) -> Budget:
        """The best division of ``staging_bytes``; on a CPU, fewer threads first, then smaller slots.

        Args:
            handing_out: results are not placed in memory that is there, so a block of them needs room, too. (On a CPU,
                an iterator's consumer gets what the budget leaves.)

        Raises:
            DeviceError: the budget is too small for a single thread.
        """
        try:
            devices = [torch.device(name) for name in dict.fromkeys(p.device for p in placements)]
            if any(placement.by_host for placement in placements):
                devices = [torch.device("cpu")]
        except RuntimeError as error:
            raise DeviceError(f"no such kind of device: {str(error).splitlines()[0]}") from error
        check_options(staging_bytes, threads)
        device = next(iter(devices), torch.device("cpu"))
        assert len({found.type == "cpu" for found in devices}) <= 1, "Plan.parts"
        if device.type != "cpu":
            room = staging_bytes * 2 // 3 if handing_out else staging_bytes
            coded = any(placement.codings for placement in placements)
            return cls.on_accelerator(device, room, threads, slot_bytes, coded=coded)
        wanted, size = threads or default_threads(), slot_bytes or default_slot_bytes(placements, staging_bytes)
        while True:
            budget = cls(wanted, wanted, size, min(size // 2, TILE_ELEMENTS), device)
            if budget.staging_bytes <= staging_bytes:
                return budget
            if threads is None and wanted > 1:
                wanted -= 1
            elif size > _MIN_SLOT_BYTES:
                size = max(size // 2, _MIN_SLOT_BYTES)
            else:
                raise DeviceError(_too_small(wanted, budget.staging_bytes, staging_bytes))

    @classmethod
    def on_accelerator(
        cls,
        device: torch.device,
        staging_bytes: int,
        threads: int | None = None,
        slot_bytes: int | None = None,
        *,
        coded: bool = False,
    ) -> Budget:
        """A slot a thread, and lanes that copy a few slots each before they quantize; smaller slots first.

        Args:
            coded: some sources are quantized already, and a lane has memory in which to decode them.
        """
        size = slot_bytes or _PINNED_SLOT_BYTES
        while size > _MIN_SLOT_BYTES and max(_LANES * _LANE_SLOTS, threads or 0) * size > staging_bytes:
            size = max(size // 2, _MIN_SLOT_BYTES)
        count = threads or max(1, min(default_threads(), staging_bytes // size))
        read_bytes = size - 2 * PAGE if size >= _ALIGNED_SLOT_BYTES else size
        in_block, scratch = (_CODED_SLOTS, _DECODED_SLOTS * size // 4) if coded else (_BLOCK_SLOTS, 0)
        budget = cls(count, count, size, scratch, device, _LANES, in_block * read_bytes, _LANE_SLOTS * size)
        if budget.staging_bytes > staging_bytes:
            raise DeviceError(_too_small(count, budget.staging_bytes, staging_bytes))
        return budget


def _too_small(threads: int, needed_bytes: int, staging_bytes: int) -> str:
    return (
        f"{threads} threads need staging_bytes of at least {needed_bytes:,}, not {staging_bytes:,}; give more, or ask "
        "for fewer threads"
    )


#: more than any machine has cores to read with
_MOST_THREADS = 4096


def check_options(staging_bytes: Any, threads: Any = None) -> None:
    """Raise a `DeviceError` unless they are numbers, large enough, and no larger than a machine can have."""
    if not isinstance(staging_bytes, int):
        raise DeviceError(f"staging_bytes is {staging_bytes!r}, not a number of bytes")
    if abs(staging_bytes) >> 63:  # which may have more digits than Python writes
        raise DeviceError("staging_bytes is beyond 63 bits, which no machine has")
    if staging_bytes < MIN_STAGING_BYTES:
        raise DeviceError(f"staging_bytes is {staging_bytes:,}; at least {MIN_STAGING_BYTES:,} (1 MiB) are needed")
    if threads is not None and not isinstance(threads, int):
        raise DeviceError(f"threads is {threads!r}, not a number of threads")
    if threads is not None and abs(threads) > _MOST_THREADS:
        raise DeviceError(f"threads is beyond {_MOST_THREADS:,}, the most that are taken")
    if threads is not None and threads < 1:
        raise DeviceError(f"threads is {threads}; at least 1 is needed")


def default_threads() -> int:
    """One thread a core, but not too many to feed."""
    return min(usable_cpus(), _MAX_THREADS)
