"""Where do the seconds of a stream into a GPU go: reading, cutting blocks, launching, or waiting for each other?

    python benchmarks/stream_gpu.py --model qwen1.5-moe-a2.7b [--threads 8 12 16] [--switch-ms 5 0.5]

One process, memory allocated, everything warm; each figure is a whole pass over the checkpoint:

    read, ring   what the machine can: files into pinned slots, with a thread a core; and on to the device
    stream       octavo's, for each number of threads and each switch interval of the interpreter (5 ms is Python's own)
    unread       the same with slots that are never filled: cutting and launching alone
    copied       the same with blocks that are copied and not quantized: reading and copying, octavo's way
    cut          blocks cut in advance, and nothing else

"launching" is what the calling thread spent on copies and kernels, its waits for the interpreter's lock included; cpu
is the processor time of all threads.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import _ceilings
import _checks
import common
import make_checkpoint
import torch
from common import say

import octavo
from octavo.adapters.transformers import load as adapter
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.choices import DEFAULT_STAGING_BYTES
from octavo.planning.blocks import Read, cut_blocks
from octavo.planning.budget import Budget
from octavo.streaming.ring import Slot
from octavo.streaming.sinks import ParameterSink, allocate_all

_stream = importlib.import_module("octavo.streaming.stream")  # `octavo.stream` is the function


def _unread(self: Any, read: Read, slot: Slot) -> int:
    slot.start = 0
    return read.nbytes


#: what is left out -> what is put in its place
WAYS: dict[str, dict[str, Any]] = {
    "stream": {},
    "unread": {
        "octavo.streaming.stream.Stream._read_part": _unread,
        "octavo.streaming.on_accelerator.DevicePress.check": lambda self: (
            None
        ),  # whatever lies in the slots need not be finite
    },
    "copied": {"octavo.streaming.on_accelerator.DevicePress._press": lambda self, block, lane: block.nbytes},
}


@contextmanager
def _switching(milliseconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(milliseconds / 1000)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Streams:
    """A planned model whose parameters have their memory, to be filled again and again."""

    def __init__(self, folder: Path, scheme: str, device: torch.device, staging_bytes: int) -> None:
        self.checkpoint, self.device = Checkpoint.open(folder), device
        self.plan = adapter.prepare(self.checkpoint, octavo.Recipe.coerce(scheme), str(device), staging_bytes).plan
        self.storages = allocate_all(self.plan.placements)

    def budget(self, threads: int | None) -> Budget:
        # of an accelerator on a CPU, too, so that this can be tried there
        count = threads or min(16, torch.get_num_threads())
        return Budget.on_accelerator(self.device, self.plan.staging_bytes, count)

    def run(self, way: str, threads: int | None, switch_ms: float) -> dict[str, Any]:
        """One pass."""
        with ExitStack() as stack:
            for name, other in WAYS[way].items():
                module, owner, attribute = name.rsplit(".", 2)
                stack.enter_context(mock.patch.object(getattr(sys.modules[module], owner), attribute, other))
            stack.enter_context(_switching(switch_ms))
            sink = ParameterSink(self.storages)
            stream = _stream.Stream(self.checkpoint, self.plan, sink, budget=self.budget(threads))
            _ceilings.synchronize(self.device)
            began, cpu = time.perf_counter(), time.process_time()
            tally = stream.run()
            _ceilings.synchronize(self.device)
            return {
                "s": round(time.perf_counter() - began, 4),
                "launching_s": round(tally.quantize_s, 4),
                "reading_s_all_threads": round(tally.read_s, 3),
                "cpu_s": round(time.process_time() - cpu, 2),
            }

    def cut(self) -> dict[str, Any]:
        """Cutting alone, in this thread."""
        began = time.perf_counter()
        blocks = list(cut_blocks(self.plan.placements, self.checkpoint.tensors, self.budget(None).block_bytes))
        boxes = sum(len(block.bundles) for block in blocks)
        return {"s": round(time.perf_counter() - began, 4), "blocks": len(blocks), "boxes": boxes}


def ceiling(folder: Path, device: torch.device, to_device: bool) -> dict[str, Any]:
    held = _ceilings.ring(folder, device, _checks.Probes(folder), "buffered", to_device)()
    return {"s": round(held.facts["steady_s"], 4)}


def best_of(repeats: int, label: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    found = [run() for _ in range(repeats)]
    best: dict[str, Any] = min(found, key=lambda one: one["s"])
    others = ", ".join(f"{key} {value}" for key, value in best.items() if key != "s")
    say(f"{label:34} {best['s']:.3f} s   {others}")
    return {**best, "all_s": [one["s"] for one in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, ["qwen1.5-moe-a2.7b"], make_checkpoint.MODELS)
    parser.add_argument("--schemes", nargs="+", default=["fp8_channel"])
    parser.add_argument("--threads", nargs="+", type=int, default=[None])
    parser.add_argument("--switch-ms", nargs="+", type=float, default=[1000 * sys.getswitchinterval()])
    parser.add_argument("--staging-bytes", type=int, default=DEFAULT_STAGING_BYTES)
    parser.add_argument("--repeats", type=int, default=3, help="of which the best is told (%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    common.add_result_arguments(parser, "stream_gpu")
    args = parser.parse_args()
    if common.lacks_gpu("stream_gpu", args.device):
        return
    device = torch.device(args.device)
    merged = common.Merged("stream_gpu", args.folder, args.output, write=not args.no_save, device=args.device)
    gc.disable()  # as `octavo.load` does
    for model in args.models:
        folder = common.model_folder(args.folder, model, args.layers)
        facts = make_checkpoint.make(model, folder, args.layers)
        common.set_cache(folder, cold=False)
        say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB, {facts['tensors']:,} tensors")
        for kind in ("read", "ring"):
            found = best_of(args.repeats, kind, functools.partial(ceiling, folder, device, kind == "ring"))
            merged.add(found, "models", folder.name, kind)
        for scheme in args.schemes:
            streams = Streams(folder, scheme, device, args.staging_bytes)
            merged.add(best_of(args.repeats, f"{scheme} cut", streams.cut), "models", folder.name, scheme, "cut")
            for way, threads, switch_ms in itertools.product(WAYS, args.threads, args.switch_ms):
                label = f"{way}, {threads or 'default'} threads, {switch_ms:g} ms"
                run = functools.partial(streams.run, way, threads, switch_ms)
                merged.add(best_of(args.repeats, f"{scheme} {label}", run), "models", folder.name, scheme, label)
            del streams
    merged.close()


if __name__ == "__main__":
    main()
