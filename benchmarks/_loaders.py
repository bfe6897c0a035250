"""Ways to bring a checkpoint onto a device: octavo's, transformers', and those that drop each tensor once it is there.

Each returns the function to be timed; what a way needs to import is imported before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from _checks import Probes, check_model

_TRACE_POINTS = 200


@dataclass
class Held:
    """What a load left behind: is it right, and what it tells about itself."""

    check: Callable[[], dict[str, Any]]
    model: Any = None
    facts: dict[str, Any] = field(default_factory=dict)
    tell: Callable[[], dict[str, Any]] = dict  # facts that take time to gather


Load = Callable[[], Held]


def octavo(folder: Path, device: torch.device, probes: Probes, scheme: str) -> Load:
    """`octavo.load`."""
    package = importlib.import_module("octavo")

    def load() -> Held:
        model = package.load(folder, scheme, device, progress=False)
        return Held(lambda: check_model(model, probes, device), model, tell=lambda: _report(model.load_report))

    return load


def _report(report: Any) -> dict[str, Any]:
    found = report.to_dict()
    trace = found.pop("trace")
    found = {key: found[key] for key in found if key not in ("quantized", "kept", "unused", "source")}
    thinned = trace[:: -(-len(trace) // _TRACE_POINTS)] if trace else []
    rows = [[round(row[0], 4), *row[1:]] for row in thinned]
    return {"report": found, "trace": {"columns": ["at_s", "placed_bytes", "rss_bytes", "device_bytes"], "rows": rows}}


def transformers_model(folder: Path, device: torch.device, probes: Probes, how: str) -> Load:
    """`from_pretrained`, in bf16 or with its own online FP8."""

    def load() -> Held:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": str(device)}
        if how == "fp8":
            options["quantization_config"] = transformers.FineGrainedFP8Config()  # 128 x 128
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        return Held(lambda: check_model(model, probes, device), model)

    return load


def safetensors_drop(folder: Path, device: torch.device, probes: Probes) -> Load:
    """Each tensor to the device and dropped, file by file, in the order of the file."""

    def load() -> Held:
        for path in probes.files:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.offset_keys():
                    probes.see(name, file.get_tensor(name))
        return Held(lambda: probes.check_seen(device))

    return load


def instanttensor(folder: Path, device: torch.device, probes: Probes) -> Load:
    """The same through InstantTensor's ring, without a copy of each tensor."""
    package = importlib.import_module("instanttensor")

    def load() -> Held:
        files = [str(path) for path in probes.files]
        with package.safe_open(files, framework="pt", device=device.index or 0, copy=False) as file:
            for name, tensor in file.tensors():
                probes.see(name, tensor)
            facts = {"backend": file.backend.name, "buffer_bytes": file.buffer_size}
        return Held(lambda: probes.check_seen(device), facts=facts)

    return load


def fastsafetensors(folder: Path, device: torch.device, probes: Probes) -> Load:
    """The same through fastsafetensors' pipeline, without GPUDirect Storage and without a copy of each tensor."""
    package = importlib.import_module("fastsafetensors")

    def load() -> Held:
        loader = package.ParallelLoader(
            None,
            [str(path) for path in probes.files],
            device=str(device),
            nogds=True,
            use_tqdm_on_load=False,
            accumulate_resident=False,
            borrowed_tensors=True,
        )
        for name, tensor in loader.iterate_weights():
            probes.see(name, tensor)
        loader.close()
        return Held(lambda: probes.check_seen(device))

    return load
