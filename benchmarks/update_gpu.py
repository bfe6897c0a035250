"""How fast are all weights of a loaded model replaced in place on a GPU, beside reading the source once?

    python benchmarks/update_gpu.py [--model qwen1.5-moe-a2.7b] [--layers N] [--folder /dev/shm/octavo-bench]

`octavo.update` requantizes new bf16 weights into the FP8 storage of a model that `octavo.load` loaded. The source is
where a trainer may have it:

    device      bf16 tensors on the GPU; the limit is reading that many bytes there once
    pinned      in pinned host memory, in a dict; the limit is one copy of that many bytes to the device
    iterator    the same from an iterator, which may use a tensor's memory again: each copy is awaited; the same limit
    pageable    in ordinary host memory; the same limit

Before anything is timed, bytes are compared with `octavo.schemes.quantize` on the CPU, for a sample of weights; after
each update addresses must be the same, memory over the model bounded by staging, and a captured graph must compute with
the new weights.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common
import make_checkpoint
import torch
from common import say
from safetensors import safe_open
from torch import Tensor

import octavo
from octavo.choices import DEFAULT_STAGING_BYTES
from octavo.numerics import schemes
from octavo.running.modules import QuantizedLinear

SAMPLE = 40
MIB = 1 << 20


def seconds(work: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def read_source(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in ordinary memory."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found[name] = opened.get_tensor(name).clone()
    return found


def pinned(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in pinned memory, some GiB at a time: torch rounds each allocation up to a power of two."""
    found: dict[str, Tensor] = {}
    buffer, used = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in source.items():
        if used + tensor.nbytes > buffer.nbytes:
            buffer, used = torch.empty(max(4 << 30, tensor.nbytes), dtype=torch.uint8, pin_memory=True), 0
        found[name] = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        used += -(-tensor.nbytes // 256) * 256
    return found


def check_bytes(model: Any, source: dict[str, Tensor], scheme: str, factor: float) -> int:
    """A sample of weights against the definition on the CPU, of the source times a factor; how many were compared."""
    compared = 0
    wanted = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    for name, module in wanted[:: max(1, len(wanted) // SAMPLE)]:
        q, scale = schemes.quantize(source[f"{name}.weight"] * factor, scheme)
        assert torch.equal(module.weight.cpu().view(torch.uint8), q.view(torch.uint8)), name
        assert torch.equal(module.weight_scale.cpu().float(), scale.float()), name
        compared += 1
    stacks = [name for name in source if ".experts." in name and name.endswith("up_proj.weight")]
    for name in stacks[:: max(1, len(stacks) // SAMPLE)]:
        stem, _, rest = name.partition(".experts.")
        experts, number = model.get_submodule(f"{stem}.experts"), int(rest.split(".")[0])
        q, _ = schemes.quantize(source[name] * factor, scheme)
        mine = experts.gate_up_proj[number, experts.gate_up_proj.shape[1] // 2 :]
        assert torch.equal(mine.cpu().view(torch.uint8), q.view(torch.uint8)), name
        compared += 1
    return compared


def captured(model: Any) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(replay, compute anew) of one quantized layer: what a graph of before an update gives, and what it should."""
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(8, layer.in_features, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    def anew() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return replay, anew


def addresses(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def timed(model: Any, make: Callable[[], Iterable[tuple[str, Tensor]]], options: argparse.Namespace) -> dict[str, Any]:
    before, times, over, staging = addresses(model), [], [], options.staging_bytes
    for _ in range(options.repeats + 1):
        pairs = make()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        times.append(seconds(lambda pairs=pairs: octavo.update(model, pairs, staging_bytes=staging)))
        over.append(torch.cuda.max_memory_allocated() - held)
    assert addresses(model) == before
    assert max(over) <= staging, (max(over), staging)
    return {"first_s": round(times[0], 3), "update_s": common.summary([round(t, 3) for t in times[1:]]),
            "over_model_bytes": max(over)}  # fmt: skip


def copy_rate() -> float:
    """Bytes a second from pinned memory to the device."""
    here = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(here, device="cuda")
    return statistics.median(here.nbytes / seconds(lambda: there.copy_(here, non_blocking=True)) for _ in range(5))


def read_rate() -> float:
    """Bytes a second that the device reads of its memory: a sum of 4 GiB."""
    there = torch.zeros(1 << 30, dtype=torch.float32, device="cuda")
    return statistics.median(there.nbytes / seconds(there.sum) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen1.5-moe-a2.7b", choices=make_checkpoint.MODELS)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for the checkpoint (%(default)s)")
    parser.add_argument("--schemes", nargs="+", default=["fp8_channel", "fp8_block"], choices=list(schemes.SCHEMES))
    parser.add_argument("--sources", nargs="+", default=["device", "pinned", "iterator", "pageable"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--staging-bytes", type=int, default=DEFAULT_STAGING_BYTES)
    common.add_result_arguments(parser, "update_gpu")
    options = parser.parse_args()
    if common.lacks_gpu("update_gpu", tries_on_cpu=False):
        return
    folder = common.model_folder(options.folder, options.model, options.layers)
    facts = make_checkpoint.make(options.model, folder, options.layers)
    source = read_source(folder)
    nbytes = sum(tensor.nbytes for tensor in source.values())
    say(f"{nbytes / 1e9:.2f} GB in {len(source):,} tensors on {torch.cuda.get_device_name()}")
    limits_s = {"device": nbytes / read_rate()}
    limits_s.update(dict.fromkeys(("pinned", "iterator", "pageable"), nbytes / copy_rate()))
    held = {"device": {name: tensor.cuda() for name, tensor in source.items()}, "pageable": source}
    held["pinned"] = held["iterator"] = pinned(source) if {"pinned", "iterator"} & set(options.sources) else {}
    facts = {"checkpoint": facts, "nbytes": nbytes, "tensors": len(source), "staging_bytes": options.staging_bytes}
    merged = common.Merged("update_gpu", options.folder, options.output, write=not options.no_save, **facts)
    for scheme in options.schemes:
        model = octavo.load(folder, scheme, "cuda", progress=False)
        replay, anew = captured(model)
        for where in options.sources:
            # other weights than those that were loaded, so that an update that does nothing fails
            octavo.update(model, ((name, tensor * 1.25) for name, tensor in held["device"].items()))
            compared = check_bytes(model, source, scheme, 1.25)
            assert torch.equal(replay(), anew())
            pairs = held[where].items()
            found = timed(model, lambda: iter(pairs) if where == "iterator" else pairs, options)  # noqa: B023
            compared += check_bytes(model, source, scheme, 1.0)
            assert torch.equal(replay(), anew())
            found.update(limit_s=round(limits_s[where], 4), compared=compared)
            found["over_limit"] = round(found["update_s"]["median"] / limits_s[where], 2)
            merged.add(found, "models", options.model, scheme, where)
            say(
                f"{scheme:12} {where:9} {found['update_s']['median']:.3f} s, limit {found['limit_s']:.3f} s "
                f"({found['over_limit']} x), over the model {found['over_model_bytes'] / MIB:.0f} MiB"
            )
        del model, replay, anew
        torch.cuda.empty_cache()
    merged.close()


if __name__ == "__main__":
    main()
