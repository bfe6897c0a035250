"""The measured side of `first_token.py`: a process from its start to its first token."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Clock:
    """Seconds since the process was started, by what has happened."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self.at_s: dict[str, float] = {}
        self.mark("python")

    def mark(self, name: str) -> None:
        self.at_s[name] = round(time.perf_counter() - self._started_s, 3)


def _octavo(folder: Path, scheme: str, device: str) -> Any:
    import octavo

    return octavo.load(folder, scheme, device, progress=False)


def _from_pretrained(folder: Path, device: str, quantization: Any = None) -> Any:
    import torch
    import transformers

    loader = transformers.AutoModelForCausalLM
    how = {"quantization_config": quantization} if quantization is not None else {}
    return loader.from_pretrained(folder, dtype=torch.bfloat16, device_map=device, **how)


def _octavo_config(folder: Path, scheme: str, device: str) -> Any:
    import octavo.adapters.transformers.quantizer as adapter

    return _from_pretrained(folder, device, adapter.OctavoConfig(scheme))


def _torchao(folder: Path, device: str) -> Any:
    import torchao.quantization as ao
    import transformers

    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
    return _from_pretrained(folder, device, transformers.TorchAoConfig(config))


def _fp8(folder: Path, device: str) -> Any:
    import transformers

    return _from_pretrained(folder, device, transformers.FineGrainedFP8Config())


def loader(way: str) -> Callable[[Path, str], Any]:
    """The function that loads, which imports what it needs."""
    if way.startswith("octavo-"):
        return lambda folder, device: _octavo(folder, way.removeprefix("octavo-"), device)
    if way.startswith("config-"):
        return lambda folder, device: _octavo_config(folder, way.removeprefix("config-"), device)
    return {"bf16": _from_pretrained, "torchao": _torchao, "fp8": _fp8}[way]


def measure(way: str, folder: Path, device_name: str, started_s: float, prompt: int) -> dict[str, Any]:
    """When torch was imported, the model loaded, the first token there."""
    clock = Clock(started_s)
    import torch

    clock.mark("torch")
    model = loader(way)(folder, device_name)
    device = torch.device(device_name)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    clock.mark("loaded")
    config = model.generation_config  # nothing but the length ends an answer
    config.eos_token_id, config.pad_token_id, config.do_sample = None, 0, False
    ids = torch.arange(3, 3 + prompt, device=device).unsqueeze(0)

    def token() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
        synchronize()

    token()
    clock.mark("first token")
    token()
    clock.mark("second token")  # what the first one took without what is done once
    found: dict[str, Any] = {"at_s": clock.at_s}
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.memory_allocated(device)
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_peak_bytes"] = torch.cuda.max_memory_reserved(device)
    report = getattr(model, "load_report", None)
    if report is not None:
        found["stages_s"] = {name: round(seconds, 3) for name, seconds in report.seconds.items()}
    return found
