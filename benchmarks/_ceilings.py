"""What the machine can: the CUDA context alone, copies of one block, and files read into slots and copied on."""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _checks import Probes, WrongError
from _loaders import Held, Load

SLOT_BYTES = 16 << 20
SLOTS = 2  # a thread
COPY_BYTES = 256 << 20


def context(folder: Path, device: torch.device, probes: Probes) -> Load:
    """What any process pays: the CUDA context and one kernel."""

    def load() -> Held:
        one = torch.ones(1, device=device)

        def check() -> dict[str, Any]:
            if float(one) != 1:
                raise WrongError(f"one is {float(one)}")
            return {}

        return Held(check)

    return load


def copy(folder: Path, device: torch.device, probes: Probes) -> Load:
    """One block of pinned memory to the device, again and again, until as many bytes as the checkpoint has (at most
    32 GB) were copied."""

    def load() -> Held:
        began = time.perf_counter()
        source = _host(COPY_BYTES, device)
        source.copy_(torch.arange(COPY_BYTES // 8).view(torch.uint8))
        target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        times = max(1, min(probes.data_bytes, 32 << 30) // COPY_BYTES)
        synchronize(device)
        ready = time.perf_counter()
        for _ in range(times):
            target.copy_(source, non_blocking=True)
        synchronize(device)
        steady_s = time.perf_counter() - ready

        def check() -> dict[str, Any]:
            if not torch.equal(target.cpu(), source):
                raise WrongError("the copy differs")
            return {}

        return Held(check, facts={"setup_s": ready - began, "steady_s": steady_s, "bytes": times * COPY_BYTES})

    return load


def ring(folder: Path, device: torch.device, probes: Probes, mode: str, to_device: bool) -> Load:
    """Threads that read the files into pinned slots, a block after another, and nothing else; or that also copy each
    block to a slot on the device, as fast as both go together.

    Args:
        mode: ``buffered``, or ``direct`` past the page cache.
    """
    threads = min(16, len(os.sched_getaffinity(0)))

    def load() -> Held:
        began = time.perf_counter()
        flags = os.O_RDONLY | (os.O_DIRECT if mode == "direct" else 0)
        files = [(os.open(path, flags), path) for path in probes.files]
        blocks = [
            (descriptor, path, offset, min(SLOT_BYTES, path.stat().st_size - offset))
            for descriptor, path in files
            for offset in range(0, path.stat().st_size, SLOT_BYTES)
        ]
        host = _host(threads * SLOTS * SLOT_BYTES, device).view(threads, SLOTS, SLOT_BYTES)
        there = torch.empty_like(host, device=device) if to_device else host
        last: dict[tuple[int, int], tuple[Path, int, int]] = {}
        turn, errors = itertools.count(), []

        def work(number: int) -> None:
            slots = [memoryview(host[number, slot].numpy()) for slot in range(SLOTS)]
            cuda = to_device and device.type == "cuda"
            stream = torch.cuda.Stream(device) if cuda else None
            copied: list[Any] = [None] * SLOTS
            for slot in itertools.cycle(range(SLOTS)):
                at = next(turn)
                if at >= len(blocks):
                    return
                descriptor, path, offset, size = blocks[at]
                if copied[slot] is not None:
                    copied[slot].synchronize()
                done = 0
                while done < size:
                    got = os.preadv(descriptor, [slots[slot][done:]], offset + done)
                    if got <= 0:
                        raise OSError(f"{path} ended at {offset + done}")
                    done += got
                if to_device:
                    with torch.cuda.stream(stream):
                        there[number, slot, :size].copy_(host[number, slot, :size], non_blocking=True)
                    copied[slot] = stream.record_event() if stream is not None else None
                last[number, slot] = path, offset, size

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:
                errors.append(error)

        synchronize(device)
        ready = time.perf_counter()
        workers = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        synchronize(device)
        steady_s = time.perf_counter() - ready
        for descriptor, _ in files:
            os.close(descriptor)
        if errors:
            raise errors[0]

        def check() -> dict[str, Any]:
            for (number, slot), (path, offset, size) in last.items():
                with path.open("rb") as file:
                    file.seek(offset)
                    wanted = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
                if not torch.equal(there[number, slot, :size].cpu(), wanted):
                    raise WrongError(f"{path} at {offset} differs")
            return {"compared": len(last)}

        facts = {"setup_s": ready - began, "steady_s": steady_s, "threads": threads, "slot_bytes": SLOT_BYTES}
        return Held(check, facts={**facts, "bytes": sum(size for *_, size in blocks)})

    return load


def _host(count: int, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)  # whole pages, for direct reads


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
