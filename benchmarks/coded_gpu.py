"""How fast does a GPU take a checkpoint that is quantized already, beside what its bytes take without any work?

    python benchmarks/coded_gpu.py [--kinds blocks mxfp4] [--shapes deepseek-v3 qwen3-moe] [--experts 128]

Files hold the matrices of a layer's experts as they are published: FP8 in blocks of 128x128, with scales in float32,
or MXFP4. They lie in the page cache; parameters have their memory. *ring* reads the files into pinned slots and copies
them on, and does nothing else. Of a stream, the best of some passes is told, and its bytes a second over the ring's;
0.7 is wanted. *launching* is what the calling thread spends on copies and kernels. Bytes are compared with those
that the host makes of some tensors.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _ceilings
import _checks
import common
import numpy as np
import torch
from common import say

import octavo
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.elements.pieces import Piece
from octavo.planning import kinds
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe
from octavo.streaming.meter import collection_paused
from octavo.streaming.sinks import ParameterSink, allocate_all

_stream = importlib.import_module("octavo.streaming.stream")  # `octavo.stream` is the function

#: rows and columns of an expert's matrices
SHAPES = {"deepseek-v3": (2048, 7168), "qwen3-moe": (768, 2048)}
#: kind -> what config.json declares
DECLARED: dict[str, dict[str, Any]] = {
    "blocks": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
    "mxfp4": {"quant_method": "mxfp4"},
}
SHARD_BYTES = 2 << 30


def tensors(kind: str, rows: int, cols: int, expert: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of an expert's tensors."""
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for name, high, wide in (("down", cols, rows), ("gate", rows, cols), ("up", rows, cols)):
        at = f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"
        if kind == "blocks":
            grid = (-(-high // 128), -(-wide // 128))
            found += [(at, "F8_E4M3", (high, wide)), (f"{at}_scale_inv", "F32", grid)]
        else:
            found += [(f"{at}_packed", "U8", (high, wide // 2)), (f"{at}_scale", "U8", (high, wide // 32))]
    return found


def make(kind: str, shape: tuple[int, int], experts: int, folder: Path) -> None:
    """Write the files; a folder that has its config is complete."""
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    block = random.integers(0, 0x7F, size=64 << 20, dtype=np.uint8)
    block ^= random.integers(0, 2, size=block.size, dtype=np.uint8) << 7  # no code of FP8 is that of no number
    each = sum(int(np.prod(dims)) * (4 if dtype == "F32" else 1) for _, dtype, dims in tensors(kind, *shape, 0))
    together = max(1, SHARD_BYTES // each)
    files: dict[str, str] = {}  # of each tensor
    for first in range(0, experts, together):
        header, end, parts = {}, 0, []
        for expert in range(first, min(first + together, experts)):
            for name, dtype, dims in tensors(kind, *shape, expert):
                count = int(np.prod(dims))
                begin, end = end, end + count * (4 if dtype == "F32" else 1)
                header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [begin, end]}
                parts.append((name, dtype, count))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        files |= dict.fromkeys(header, f"model-{first:05d}.safetensors")
        with (folder / f"model-{first:05d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, dtype, count in parts:
                if dtype == "F32":
                    file.write((random.random(count, dtype=np.float32) * 1e-3 + 1e-4).data)
                elif name.endswith("_scale"):
                    file.write(random.integers(118, 125, size=count, dtype=np.uint8).data)
                else:
                    start = int(random.integers(0, block.size - count)) if count < block.size else 0
                    file.write(block[start : start + count].data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": DECLARED[kind]}))


def stacks(checkpoint: Checkpoint, device: str, experts: Sequence[int] | None = None) -> list[Target]:
    """Gate and up of all experts, or of some, in one parameter, and down in another."""
    at = "model.layers.0.mlp.experts."
    numbers = experts or range(len(checkpoint.tensors) // 3)
    rows, cols = checkpoint.tensors[f"{at}0.gate_proj.weight"].shape
    both, down = [], []
    for to, number in enumerate(numbers):
        for half, name in enumerate(("gate", "up")):
            source = f"{at}{number}.{name}_proj.weight"
            both.append(Piece((to, half * rows, 0), (1, rows, cols), source, 0, (rows * cols, cols, 1)))
        source = f"{at}{number}.down_proj.weight"
        down.append(Piece((to, 0, 0), (1, cols, rows), source, 0, (rows * cols, rows, 1)))
    return [
        Target("gate_up", (len(numbers), 2 * rows, cols), None, kinds.EXPERTS, tuple(both), device),
        Target("down", (len(numbers), cols, rows), None, kinds.EXPERTS, tuple(down), device),
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Streams:
    """A planned checkpoint whose tensors have their memory, to be filled again and again."""

    def __init__(self, folder: Path, scheme: str | None, device: torch.device, staging_bytes: int) -> None:
        self.checkpoint, self.device, self.scheme = Checkpoint.open(folder).decoded(), device, scheme
        self.plan = make_plan(self.checkpoint, stacks(self.checkpoint, str(device)), Recipe(scheme), staging_bytes)
        self.storages = allocate_all(self.plan.placements)
        self.experts = self.plan.placements[0].shape[0]

    def run(self) -> dict[str, Any]:
        """One pass."""
        stream = _stream.Stream(self.checkpoint, self.plan, ParameterSink(self.storages))
        _ceilings.synchronize(self.device)
        began, cpu = time.perf_counter(), time.process_time()
        with collection_paused():  # as a load does
            tally = stream.run()
        _ceilings.synchronize(self.device)
        took, used = time.perf_counter() - began, time.process_time() - cpu
        return {"s": round(took, 4), "launching_s": round(tally.quantize_s, 4), "cpu_s": round(used, 2)}

    def check(self) -> None:
        """Raise unless a few tensors are those that the host makes."""
        for number in {0, self.experts // 2, self.experts - 1}:
            targets = stacks(self.checkpoint, "cpu", [number])
            plan = make_plan(self.checkpoint, targets, Recipe(self.scheme), self.plan.staging_bytes)
            mine = allocate_all(plan.placements)
            _stream.Stream(self.checkpoint, plan, ParameterSink(mine)).run()
            for name, storage in mine.items():
                there = self.storages[name]
                for a, b in ((storage.weight, there.weight), (storage.scale, there.scale)):
                    if a is not None and b is not None and not same(a[0], b[number].cpu()):
                        raise SystemExit(f"{name}, expert {number}, {self.scheme}: not the bytes of the host")


def ceiling(folder: Path, device: torch.device) -> dict[str, Any]:
    held = _ceilings.ring(folder, device, _checks.Probes(folder), "buffered", True)()
    return {"s": round(held.facts["steady_s"], 4)}


def best_of(repeats: int, label: str, nbytes: int, run: Any) -> dict[str, Any]:
    found = [run() for _ in range(repeats)]
    best: dict[str, Any] = min(found, key=lambda one: one["s"])
    best = {**best, "gb_a_s": round(nbytes / best["s"] / 1e9, 2), "all_s": [one["s"] for one in found]}
    say(f"{label:40} {best}")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for checkpoints (%(default)s)")
    parser.add_argument("--kinds", nargs="+", default=list(DECLARED), choices=DECLARED)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--experts", type=int, default=128, help="of deepseek-v3; of others as many bytes")
    parser.add_argument("--schemes", nargs="+", default=["fp8_channel", "fp8_block"])
    parser.add_argument("--staging-bytes", type=int, default=octavo.choices.DEFAULT_STAGING_BYTES)
    parser.add_argument("--repeats", type=int, default=3, help="of which the best is told (%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    common.add_result_arguments(parser, "coded_gpu")
    args = parser.parse_args()
    if common.lacks_gpu("coded_gpu", args.device):
        return
    device = torch.device(args.device)
    with common.merged("coded_gpu", args, device=args.device) as result:
        for kind in args.kinds:
            for shape in args.shapes:
                measure(kind, shape, args, device, result)


def measure(kind: str, name: str, args: argparse.Namespace, device: torch.device, result: Any) -> None:
    rows, cols = SHAPES[name]
    whole = SHAPES["deepseek-v3"][0] * SHAPES["deepseek-v3"][1]
    experts = args.experts * whole // (rows * cols)
    folder = args.folder / f"experts-{kind}-{name}-{experts}"
    make(kind, (rows, cols), experts, folder)
    common.warm(folder)
    nbytes = common.size(folder)
    say(f"== {kind}, {name}: {nbytes / 1e9:.2f} GB, {experts} experts")
    ring = best_of(args.repeats, "ring", nbytes, functools.partial(ceiling, folder, device))
    result.add(ring, kind, name, "ring")
    for scheme in args.schemes:
        streams = Streams(folder, scheme, device, args.staging_bytes)
        found = best_of(args.repeats, scheme, nbytes, streams.run)
        streams.check()
        found["over_ring"] = round(ring["s"] / found["s"], 3)
        say(f"{scheme}: {found['over_ring']} of the ring's bytes a second")
        result.add(found, kind, name, scheme)
        del streams


if __name__ == "__main__":
    main()
