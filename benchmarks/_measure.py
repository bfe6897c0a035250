"""The measured side of `load_gpu.py`: one way to load, once, in a process that does nothing else.

What a way needs to import is imported before the clock starts, as a script's first lines would; what it imports by
itself (model code, its own parts), the CUDA context, and kernels that are loaded when first used count.
"""

from __future__ import annotations

import gc
import importlib
import importlib._bootstrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _ceilings
import _loaders
import torch
from _ceilings import synchronize
from _checks import Probes, WrongError
from _loaders import Load

PAUSE_S = 0.1  # between the load and what comes after it, for who samples memory from outside
SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8")
#: name -> (function, its further arguments)
WAYS: dict[str, tuple[Callable[..., Load], tuple[Any, ...]]] = {
    "context": (_ceilings.context, ()),
    "copy": (_ceilings.copy, ()),
    "read": (_ceilings.ring, ("buffered", False)),
    "read-direct": (_ceilings.ring, ("direct", False)),
    "ring": (_ceilings.ring, ("buffered", True)),
    "ring-direct": (_ceilings.ring, ("direct", True)),
    "instanttensor": (_loaders.instanttensor, ()),
    "fastsafetensors": (_loaders.fastsafetensors, ()),
    "safetensors": (_loaders.safetensors_drop, ()),
    **{f"octavo-{scheme}": (_loaders.octavo, (scheme,)) for scheme in SCHEMES},
    "transformers-fp8": (_loaders.transformers_model, ("fp8",)),
    "transformers-bf16": (_loaders.transformers_model, ("bf16",)),
}


class ImportClock:
    """Seconds that the importing of modules takes, on the thread that made it, while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False
        self._thread = threading.get_ident()

    def __enter__(self) -> ImportClock:
        # what every import of a module that is not yet there goes through, as `-X importtime` has it
        self._original = importlib._bootstrap._find_and_load  # type: ignore[attr-defined]
        importlib._bootstrap._find_and_load = self._timed  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        importlib._bootstrap._find_and_load = self._original  # type: ignore[attr-defined]

    def _timed(self, *arguments: Any) -> Any:
        if self._inside or threading.get_ident() != self._thread:
            return self._original(*arguments)
        self._inside, began = True, time.perf_counter()
        try:
            return self._original(*arguments)
        finally:
            self._inside = False
            self.seconds += time.perf_counter() - began


def measure(way: str, folder: Path, device_name: str, started_s: float, forward: bool) -> dict[str, Any]:
    """Load once; times in seconds, ``*_at_s`` on the clock of `time.perf_counter`."""
    device = torch.device(device_name)
    cuda = device.type == "cuda"
    probes = Probes(folder)
    make, arguments = WAYS[way]
    load = make(folder, device, probes, *arguments)
    with ImportClock() as imports:
        began = time.perf_counter()
        held = load()
        synchronize(device)
        ended = time.perf_counter()
    found: dict[str, Any] = {
        "imports_s": began - started_s,
        "load_s": ended - began,
        "imports_in_load_s": imports.seconds,
        "process_s": ended - started_s,
        "began_at_s": began,
        "ended_at_s": ended,
    }
    if cuda:
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)
        gc.collect()
        found["allocated_final_bytes"] = torch.cuda.memory_allocated(device)
        found["reserved_final_bytes"] = torch.cuda.memory_reserved(device)
        found["cuda"] = torch.version.cuda
    time.sleep(PAUSE_S)
    if held.model is not None:
        found["model_bytes"] = sum(_storages(held.model))
        if forward:
            found |= _first_forward(held.model, device)
    found |= {**held.facts, **held.tell()}
    try:
        return {**found, "check": held.check()}
    except WrongError as error:
        return {**found, "check": {"wrong": str(error)}}


def _storages(model: Any) -> Iterator[int]:
    tensors = [*model.parameters(), *model.buffers()]
    yield from {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()


def _first_forward(model: Any, device: torch.device) -> dict[str, Any]:
    """Seconds until the first logits: kernels that are compiled or loaded when first used show here."""
    began = time.perf_counter()
    try:
        with torch.no_grad():
            logits = model(torch.arange(8, device=device)[None]).logits
        synchronize(device)
    except Exception as error:  # other libraries' to raise: told, and no reason to drop the load's figures
        return {"first_forward_error": f"{type(error).__name__}: {error}"[:300]}
    if not bool(torch.isfinite(logits).all()):
        return {"first_forward_error": "the logits are not finite"}
    return {"first_forward_s": time.perf_counter() - began}
