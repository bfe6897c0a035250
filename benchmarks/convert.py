"""How long does a conversion to FP8 take, and how much memory, beside llm-compressor's `model_free_ptq`?

    python benchmarks/convert.py --peer-python VENV/bin/python
    python benchmarks/convert.py --make-peer VENV        # makes that interpreter first (pip, 2 GB)

Llama-3-8B's shape cut to 4 layers: 3.85 GB of bf16 in two shards, both in the page cache. Every run is a process of
its own; the two take turns; outputs are removed between. Both leave lm_head and the embedding as they are.

octavo syncs what it writes before it gives it its name, and the peer leaves that to the kernel: ``fsync_s`` says what
that took, ``without sync`` is octavo with `os.fsync` made to do nothing, and ``flush_s`` how long the kernel still
needed once a process had ended. The ceilings are what this machine can do at all, measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import make_checkpoint
from common import run_fresh, say, summary

SCHEMES = {"fp8_channel": "FP8_DYNAMIC", "fp8_block": "FP8_BLOCK"}  # ours -> the peer's
PEER = ("llmcompressor>=0.14,<0.15", "torch==2.13.0")
THREADS = 2

OCTAVO = f"""
import os
fsync, took = os.fsync, []
def timed(descriptor):
    began = time.perf_counter()
    if sys.argv[4] == "sync":
        fsync(descriptor)
    took.append(time.perf_counter() - began)
os.fsync = timed
import octavo
began = time.perf_counter()
report = octavo.convert(sys.argv[1], sys.argv[2], sys.argv[3], threads={THREADS}, progress=False)
call_s = time.perf_counter() - began
result(call_s=call_s, fsync_s=sum(took), stages=report.seconds,
       read_thread_s=report.read_thread_s, quantize_thread_s=report.quantize_thread_s)
"""

PEER_CALL = f"""
from llmcompressor import model_free_ptq
began = time.perf_counter()
model_free_ptq(model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[3],
               ignore=["lm_head", "model.embed_tokens"], max_workers={THREADS}, device="cpu")
result(call_s=time.perf_counter() - began)
"""

PEER_VERSIONS = """
from importlib import metadata
names = ("llmcompressor", "compressed-tensors", "torch", "transformers", "safetensors")
result(**{name: metadata.version(name) for name in names})
"""

VERIFY = """
import octavo
report = octavo.verify(sys.argv[1], sys.argv[2], progress=False)
result(ok=report.ok, tensors=len(report.tensors), different=[one.name for one in report.different])
"""

CEILINGS = """
import os, threading
from pathlib import Path
source, target, threads, block = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), 8 << 20
files = sorted(source.glob("*.safetensors"))

def parallel(work):
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    return time.perf_counter() - began

def read(number):
    buffer = memoryview(bytearray(block))
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        for offset in range(number * block, path.stat().st_size, threads * block):
            os.preadv(descriptor, [buffer], offset)
        os.close(descriptor)

def copy():
    # half of the bytes: about what a conversion writes; in blocks of 1 MiB, which is faster than larger ones
    left = sum(path.stat().st_size for path in files) // 2
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for path in files:
        into = os.open(path, os.O_RDONLY)
        while left and (data := os.read(into, min(1 << 20, left))):
            left -= os.write(out, data)
        os.close(into)
    return out

read_s = parallel(read)
began = time.perf_counter()
out = copy()
copy_s = time.perf_counter() - began
os.fsync(out)
synced_s = time.perf_counter() - began
os.close(out)
target.unlink()

import torch
from octavo import schemes
from octavo.chunks import cut_tiles
total, elements, repeats = sum(path.stat().st_size for path in files), block // 2, 120
big = [[torch.zeros(64 * block, dtype=torch.uint8) for _ in range(2)] for _ in range(threads)]

def memory(number):
    for _ in range(2): big[number][1].copy_(big[number][0])

def quantize(scheme):
    # the arithmetic of the stream alone: one chunk a thread that stays in the cache, again and again
    weights = [(torch.randn(elements // 4096, 4096) * 0.02).bfloat16() for _ in range(threads)]
    def work(number):
        torch.set_num_threads(1)
        weight, scratch = weights[number], torch.empty(1 << 19)
        out = torch.empty(weight.shape, dtype=schemes.FP8)
        for _ in range(repeats):
            for tile in cut_tiles(tuple(weight.shape), scheme, (0, 0), scratch.numel()):
                x = tile.region(weight)
                amax = schemes.group_amax(x, scheme, scratch=scratch.view(torch.bfloat16))
                scale = schemes.scale_from_amax(amax, scheme)
                schemes.quantize_into(tile.region(out), x, scale, scheme, scratch=scratch)
    return threads * repeats * block / parallel(work) / 1e9

result(read_gb_per_s=total / read_s / 1e9, copy_half_s=copy_s, copy_half_synced_s=synced_s,
       memory_copy_gb_per_s=threads * 2 * 64 * block / parallel(memory) / 1e9,
       quantize_gb_per_s={name: quantize(schemes.get(name)) for name in ("fp8_channel", "fp8_block")})
"""


def timed_run(source: Path, out: Path, code: str, *options: str, python: str) -> dict[str, Any]:
    """One conversion in a fresh process, sources warm, nothing left to write from the run before."""
    shutil.rmtree(out, ignore_errors=True)
    common.warm(source)
    os.sync()
    values = run_fresh(code, source, out, *options, python=python)
    began = perf_counter()
    os.sync()
    return {**values, "flush_s": perf_counter() - began, "written_bytes": common.size(out)}


def check(source: Path, out: Path) -> None:
    """The bytes must be right before they are worth timing."""
    for scheme in SCHEMES:
        shutil.rmtree(out, ignore_errors=True)
        run_fresh(OCTAVO, source, out, scheme, "no sync")
        verified = run_fresh(VERIFY, out, source)
        if not verified["ok"]:
            raise SystemExit(f"{scheme}: wrong bytes in {verified['different'][:5]}")
        say(f"{scheme}: {verified['tensors']} tensors verified")


def condense(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions of one way to convert."""
    flat = [{**run.pop("process"), **run} for run in runs]
    keys = [key for key in flat[0] if isinstance(flat[0][key], int | float)]
    result: dict[str, Any] = {key: summary([round(run[key], 3) for run in flat]) for key in keys}
    if "stages" in flat[0]:
        result["stages_of_last_run"] = flat[-1]["stages"]
    return result


def compare(ways: dict[str, Any]) -> dict[str, float]:
    """octavo's share of what the peer takes; below 1 is less."""
    keys = ("call_s", "wall_s", "cpu_s", "peak_rss_bytes", "peak_anonymous_bytes_sampled")
    return {key: round(ways["octavo"][key]["median"] / ways["peer"][key]["median"], 3) for key in keys}


def make_peer(folder: Path) -> str:
    if not (folder / "bin/python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", *PEER], check=True)
    return str(folder / "bin/python")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of Llama-3-8B (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="%(default)s")
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for checkpoint and outputs (%(default)s)")
    parser.add_argument("--peer-python", help="an interpreter that has llmcompressor; without it, the peer is skipped")
    parser.add_argument("--make-peer", type=Path, metavar="VENV", help="make that interpreter with pip")
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    peer = make_peer(args.make_peer) if args.make_peer else args.peer_python
    source, out = args.folder / f"llama3-8b-{args.layers}", args.folder / "converted"
    checkpoint = make_checkpoint.make("llama3-8b", source, args.layers)
    peer_versions = run_fresh(PEER_VERSIONS, python=peer) if peer else None
    if peer_versions:
        peer_versions.pop("process")
    else:
        say("no --peer-python: octavo alone")
    check(source, out)
    common.warm(source)
    os.sync()
    ceilings = run_fresh(CEILINGS, source, args.folder / "copy", THREADS)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {scheme: {} for scheme in SCHEMES}
    for number in range(args.repetitions):
        for scheme, peers_name in SCHEMES.items():
            ways = {
                "octavo": (OCTAVO, (scheme, "sync"), sys.executable),
                "octavo_without_sync": (OCTAVO, (scheme, "no sync"), sys.executable),
                **({"peer": (PEER_CALL, (peers_name,), peer)} if peer else {}),
            }
            for way, (code, options, python) in ways.items():
                run = timed_run(source, out, code, *options, python=python)
                runs[scheme].setdefault(way, []).append(run)
                peak = run["process"]["peak_rss_bytes"] / 1e6
                say(f"{number + 1}/{args.repetitions} {scheme:12} {way:20} {run['call_s']:6.2f} s {peak:6.0f} MB")
    shutil.rmtree(out, ignore_errors=True)
    schemes = {}
    for scheme, by_way in runs.items():
        ways = {way: condense(found) for way, found in by_way.items()}
        share = compare(ways) if peer else None
        speed = checkpoint["bytes"] / ways["octavo"]["call_s"]["median"] / 1e9
        schemes[scheme] = {**ways, "octavo_over_peer": share, "octavo_gb_per_s": round(speed, 3)}
        say(f"{scheme}: octavo {speed:.2f} GB/s; octavo over peer {share}")
    values = {
        "cache": "warm",
        "checkpoint": checkpoint,
        "threads": THREADS,
        "peer": peer_versions or "skipped: no --peer-python",
        "ceilings": {key: value for key, value in ceilings.items() if key != "process"},
        "schemes": schemes,
    }
    common.save("convert", args.folder, values, write=not args.no_save)


if __name__ == "__main__":
    main()
