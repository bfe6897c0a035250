"""How a staging budget is divided: threads, slots and scratch memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from .chunks import default_slot_bytes
from .errors import DeviceError
from .files import PAGE
from .plan import Plan

MIN_STAGING_BYTES = 1 << 20
#: elements of a tile on a CPU: what stays in a core's cache
_SCRATCH_ELEMENTS = 1 << 19
#: slots on an accelerator: one for each thread, large enough to hide the cost of launching copies and kernels
PINNED_SLOT_BYTES = 16 << 20
_MAX_THREADS = 16
#: streams of a GPU, and the slots that each copies before it quantizes
_LANES = 2
_SLOTS_A_BLOCK = 6
#: where many threads are asked for with a small budget
_MIN_SLOT_BYTES = 1 << 12


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the staging budget is divided: threads, slots and scratch."""

    threads: int
    slots: int
    slot_bytes: int
    scratch_elements: int
    device: torch.device
    lanes: int = 0  # on a GPU: streams that copy and quantize at the same time; 0: threads do it, on a CPU
    block_bytes: int = 0  # what is copied and quantized at once
    lane_bytes: int = 0  # a block, and what kernels need beside it

    @property
    def read_bytes(self) -> int:
        """What is read into a slot at once: where slots are large, room is left for aligning direct reads."""
        return self.slot_bytes - 2 * PAGE if self.slot_bytes >= 64 * PAGE else self.slot_bytes

    @property
    def host_bytes(self) -> int:
        """Slots and, on a CPU, scratch and FP8 output: at most half a slot, since sources have two bytes or more."""
        scratch = self.slot_bytes // 2 + self.scratch_elements * 8 if self.device.type == "cpu" else 0
        return self.slots * self.slot_bytes + self.threads * scratch

    @property
    def device_bytes(self) -> int:
        return self.lanes * self.lane_bytes

    @property
    def staging_bytes(self) -> int:
        """On the host or the device, whichever is more."""
        return max(self.host_bytes, self.device_bytes)

    @classmethod
    def fit(cls, plan: Plan, threads: int | None = None, slot_bytes: int | None = None) -> Geometry:
        """The largest geometry within ``plan.staging_bytes``: fewer threads first (unless given), then smaller slots.

        Raises:
            DeviceError: the budget is too small for a single thread.
        """
        try:
            devices = {torch.device(p.device) for p in plan.placements} or {torch.device("cpu")}
        except RuntimeError as error:
            raise DeviceError(f"no such kind of device: {str(error).splitlines()[0]}") from error
        if len(devices) > 1:
            raise DeviceError(f"a model spread over {', '.join(sorted(map(str, devices)))} is not supported: name one")
        _check_options(plan.staging_bytes, threads)
        device, wanted = next(iter(devices)), threads or _default_threads()
        size = slot_bytes or (default_slot_bytes(plan) if device.type == "cpu" else PINNED_SLOT_BYTES)
        while True:
            if device.type == "cpu":
                geometry = cls(wanted, wanted, size, min(size // 2, _SCRATCH_ELEMENTS), device)
            else:
                geometry = cls.on_accelerator(plan, device, wanted, size)
            if geometry.staging_bytes <= plan.staging_bytes:
                return geometry
            if threads is None and wanted > 1 and geometry.host_bytes > plan.staging_bytes:
                wanted -= 1
            elif size > _MIN_SLOT_BYTES:
                size = max(size // 2, _MIN_SLOT_BYTES)
            else:
                raise DeviceError(
                    f"{wanted} threads need staging_bytes of at least {geometry.staging_bytes:,}, not "
                    f"{plan.staging_bytes:,}; give more, or ask for fewer threads"
                )

    @classmethod
    def on_accelerator(cls, plan: Plan, device: torch.device, threads: int, slot_bytes: int) -> Geometry:
        """A slot a thread, and lanes that copy a few slots each before they quantize."""
        # clamping to what e4m3 holds takes another copy of a block
        copies = 2 if any(p.scheme == "mxfp8" for p in plan.quantized) else 1
        block_bytes = slot_bytes * _SLOTS_A_BLOCK // copies
        return cls(threads, threads, slot_bytes, 0, device, _LANES, block_bytes, block_bytes * copies)


def _check_options(staging_bytes: Any, threads: Any) -> None:
    if not isinstance(staging_bytes, int):
        raise DeviceError(f"staging_bytes is {staging_bytes!r}, not a number of bytes")
    if staging_bytes < MIN_STAGING_BYTES:
        raise DeviceError(f"staging_bytes is {staging_bytes:,}; at least {MIN_STAGING_BYTES:,} (1 MiB) are needed")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise DeviceError(f"threads is {threads!r}; at least 1 is needed")


def usable_device(device: str | torch.device, *, begin: bool = True) -> torch.device:
    """The device, once it is known that tensors can be on it; a `DeviceError` otherwise.

    Args:
        begin: begin to use it, which takes a third of a second on a GPU; else only look whether there is one.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no weights")
        # counting does not begin to use any (is_available does)
        there = found.type == "cuda" and torch.cuda.device_count() > (found.index or 0)
        if found.type != "cpu" and (begin or not there):
            torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {str(device)!r} can't be used here: {reason}") from error
    return found


def pinned_slots(staging_bytes: int, threads: int | None) -> int:
    """How many slots of `PINNED_SLOT_BYTES` a stream to an accelerator will take, as far as is known before planning.

    Raises:
        DeviceError: the options are no numbers, or too small.
    """
    _check_options(staging_bytes, threads)
    return min(threads or _default_threads(), staging_bytes // PINNED_SLOT_BYTES)


def _default_threads() -> int:
    return min(_usable_cpus(), _MAX_THREADS)


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
