"""The measured side of `load_gpu.py`: every way to bring a checkpoint onto a device, and whether it did.

`measure` runs one of them, once, in a process that does nothing else. What a way needs to import is imported before the
clock starts, as a script's first lines would; what it imports by itself (model code, its own parts), the CUDA context,
and kernels that are loaded when first used count.
"""

from __future__ import annotations

import gc
import importlib
import importlib._bootstrap
import itertools
import json
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

PAUSE_S = 0.1  # between the load and what comes after it, for who samples memory from outside
SLOT_BYTES = 16 << 20
SLOTS = 2  # a thread
COPY_BYTES = 256 << 20
PROBES = 12
FP8_ERROR = 0.06  # relative; the rounding to e4m3 alone makes 0.026
_CHECK_ELEMENTS = 1 << 26
_TRACE_POINTS = 200


class WrongError(AssertionError):
    """A loader's result is not the checkpoint's content."""


# -- the checkpoint, read independently -------------------------------------------------------------------------------


class Probes:
    """Some tensors of the checkpoint, spread over it, that a loader's result is compared with."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self.tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self.data_bytes = 0
        for path in self.files:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    self.tensors[name] = (path, tuple(entry["shape"]))
                    self.data_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
        matrices = [name for name, (_, shape) in self.tensors.items() if len(shape) > 1]
        spread = {matrices[at * (len(matrices) - 1) // (PROBES - 1)] for at in range(PROBES)}
        largest = max(matrices, key=lambda name: torch.Size(self.tensors[name][1]).numel())
        self.names = sorted(spread | {largest})
        self._seen: dict[str, tuple[torch.device, torch.Tensor]] = {}
        self._seen_bytes = 0

    def source(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor as safetensors reads it on the CPU; ``index`` takes one member of a stack."""
        with safetensors.safe_open(self.tensors[name][0], framework="pt") as file:
            part = file.get_slice(name)
            return part[:] if index is None else part[index : index + 1][0]

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Called with every tensor that a loader hands out, before it is dropped: keeps a few elements of some."""
        self._seen_bytes += tensor.nbytes
        if name in self.names:  # waits, so that a tensor lent from a buffer is not overwritten meanwhile
            self._seen[name] = tensor.device, _some(tensor).to("cpu", copy=True)

    def check_seen(self, device: torch.device) -> dict[str, Any]:
        """Every byte was handed out, and what was kept is the checkpoint's."""
        if self._seen_bytes != self.data_bytes:
            raise WrongError(f"{self._seen_bytes:,} bytes were handed out, the checkpoint has {self.data_bytes:,}")
        for name in self.names:
            if name not in self._seen:
                raise WrongError(f"{name} was not handed out")
            where, found = self._seen[name]
            if where.type != device.type:
                raise WrongError(f"{name} is on {where}")
            if not torch.equal(found, _some(self.source(name))):
                raise WrongError(f"{name} differs from the checkpoint")
        return {"compared": len(self.names)}


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)]


# -- is a model the checkpoint's? -------------------------------------------------------------------------------------


def check_model(model: Any, probes: Probes, device: torch.device) -> dict[str, Any]:
    """Weights are, where probed, those of the checkpoint (in FP8: up to its rounding); all are finite and in place."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stored = _octavo_storage(model)
    compared, errors = 0, []
    for name in probes.names:
        found = _find(state, stored, name, probes.tensors[name][1])
        if found is None:
            continue
        value, index = found
        source = probes.source(name, index).to(device)
        if value.dtype == source.dtype:
            if not torch.equal(value, source):
                raise WrongError(f"{name} differs from the checkpoint")
        else:
            error = float((value - source.float()).norm() / source.float().norm())
            if not error < FP8_ERROR:
                raise WrongError(f"{name} is off by {error:.3f} of its norm")
            errors.append(error)
        compared += 1
    if compared < len(probes.names) / 2:
        raise WrongError(f"of {probes.names}, only {compared} could be found in the model")
    for name, tensor in state.items():
        if tensor.device.type != device.type:
            raise WrongError(f"{name} is on {tensor.device}")
        if not _finite(tensor.detach()):
            raise WrongError(f"{name} is not finite")
    fp8 = sum(tensor.numel() for tensor in state.values() if tensor.dtype == torch.float8_e4m3fn)
    largest = max(errors, default=0.0)
    return {"compared": compared, "compared_in_fp8": len(errors), "largest_error": largest, "fp8_elements": fp8}


def _finite(tensor: torch.Tensor) -> bool:
    for part in tensor.reshape(-1).split(_CHECK_ELEMENTS):
        if part.dtype == torch.float8_e4m3fn:  # all ones but the sign: not a number
            if bool(((part.view(torch.uint8) & 0x7F) == 0x7F).any()):
                return False
        elif part.dtype == torch.float8_e8m0fnu:
            if bool((part.view(torch.uint8) == 0xFF).any()):
                return False
        elif part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return False
    return True


@dataclass(frozen=True)
class _Stored:
    """How octavo stores a quantized weight."""

    scheme: str
    parts: tuple[int, ...]
    transposed: bool  # [out, in], though the checkpoint has [in, out]


def _octavo_storage(model: Any) -> dict[str, _Stored]:
    from octavo.modules import quantized_weights

    return {
        name: _Stored(
            scheme, parts, bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))
        )
        for name, scheme, parts in quantized_weights(model)
    }


def _find(
    state: dict[str, torch.Tensor], stored: dict[str, _Stored], name: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, int | None] | None:
    """The values that a model holds for a checkpoint tensor, and which member of it they are if it is a stack (the
    last); None where this does not know to look."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    half, index, member = slice(None), None, None
    if expert and name not in state:
        path, number, kind = expert.groups()
        index = int(number)
        name = f"{path}.down_proj" if kind == "down" else f"{path}.gate_up_proj"
        half = {"gate": slice(shape[0]), "up": slice(shape[0], None), "down": half}[kind]
    elif len(shape) == 3:
        index = member = shape[0] - 1
        name = name.replace("input_linear.weight", "experts.gate_up_proj")
        name = name.replace("output_linear.weight", "experts.down_proj")
    if name not in state:
        return None
    value = _values(state, stored, name, index)[half]
    return (value, member) if value.shape == shape[-2:] else None


def _values(state: dict[str, torch.Tensor], stored: dict[str, _Stored], name: str, index: int | None) -> torch.Tensor:
    weight = state[name].detach()
    weight = weight if index is None else weight[index]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    scale = state[f"{name}_scale" if name in stored else f"{name}_scale_inv"].detach()
    scale = scale if index is None else scale[index]
    if name in stored:
        from octavo import schemes

        value = schemes.dequantize(weight, scale, stored[name].scheme, stored[name].parts)
        return value.T if stored[name].transposed else value
    rows, cols = weight.shape
    return weight.float() * scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


# -- the ways ---------------------------------------------------------------------------------------------------------


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


# -- ceilings ---------------------------------------------------------------------------------------------------------


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
        _synchronize(device)
        ready = time.perf_counter()
        for _ in range(times):
            target.copy_(source, non_blocking=True)
        _synchronize(device)
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

        _synchronize(device)
        ready = time.perf_counter()
        workers = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        _synchronize(device)
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8")
#: name -> (function, its further arguments)
WAYS: dict[str, tuple[Callable[..., Load], tuple[Any, ...]]] = {
    "context": (context, ()),
    "copy": (copy, ()),
    "read": (ring, ("buffered", False)),
    "read-direct": (ring, ("direct", False)),
    "ring": (ring, ("buffered", True)),
    "ring-direct": (ring, ("direct", True)),
    "instanttensor": (instanttensor, ()),
    "fastsafetensors": (fastsafetensors, ()),
    "safetensors": (safetensors_drop, ()),
    **{f"octavo-{scheme}": (octavo, (scheme,)) for scheme in SCHEMES},
    "transformers-fp8": (transformers_model, ("fp8",)),
    "transformers-bf16": (transformers_model, ("bf16",)),
}


# -- measuring --------------------------------------------------------------------------------------------------------


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
        _synchronize(device)
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
        _synchronize(device)
    except Exception as error:  # other libraries' to raise: told, and no reason to drop the load's figures
        return {"first_forward_error": f"{type(error).__name__}: {error}"[:300]}
    if not bool(torch.isfinite(logits).all()):
        return {"first_forward_error": "the logits are not finite"}
    return {"first_forward_s": time.perf_counter() - began}
