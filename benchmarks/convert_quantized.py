"""What does a source that is quantized already cost, beside the same weights in bf16? Time, and memory.

    python benchmarks/convert_quantized.py
    python benchmarks/convert_quantized.py --memory        # needs 17 GB of disk

*Speed*: matrices of Llama-3-8B, as bf16 and as FP8 in blocks of 128x128 that octavo has made of them, both in the page
cache. Conversions take turns, each in a process of its own that has imported all before; with ``cpu_s``, what they took
of processors is compared, which other processes disturb less. FP8 has twice the weights in a byte: ``byte`` compares
what a byte of the source takes, ``weight`` what a weight does.

*Memory*: peaks of processes as a user starts them, imports and all, by the kernel's count (VmHWM) and, sampled, of what
can't be dropped (anonymous); of a load also what the process had when it began to read. A checkpoint of 4.1 GB in FP8
blocks is converted; one of 2.1 GB whose experts are stacks of MXFP4, as those of gpt-oss, is loaded to become FP8.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import common
import make_checkpoint
from common import run_fresh, say, summary

THREADS = 2
LAYERS = 2
MEMORY_LAYERS = 19
#: name -> source, scheme
WAYS = {
    "bf16 to fp8_channel": ("bf16", "fp8_channel"),
    "blocks to fp8_channel": ("blocks", "fp8_channel"),
    "blocks to fp8_block": ("blocks", "fp8_block"),
    "blocks to bf16": ("blocks", "none"),
}
BASELINE = "bf16 to fp8_channel"

MAKE_BLOCKS = """
import octavo
octavo.convert(sys.argv[1], sys.argv[2], "fp8_block", format="fp8", progress=False, prove=False)
result(done=True)
"""

CONVERT = f"""
import shutil
import octavo
scheme = None if sys.argv[3] == "none" else sys.argv[3]
octavo.plan(sys.argv[1], scheme)
call = dict(threads={THREADS}, progress=False, prove=False)
used, began = time.process_time(), time.perf_counter()
report = octavo.convert(sys.argv[1], sys.argv[2], scheme, **call)
result(call_s=time.perf_counter() - began, cpu_s=time.process_time() - used, read_bytes=report.read_bytes,
       read_thread_s=report.read_thread_s, quantize_thread_s=report.quantize_thread_s)
"""

VERIFY = """
import octavo
verified = octavo.verify(sys.argv[1], against=sys.argv[2])
result(ok=verified.ok)
"""

# by the process itself: what it has from `os.wait4` may be the peak of this one, which made the checkpoint
_PEAK = """
import re
def peak_bytes():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
"""

CONVERT_AS_USERS_DO = f"""{_PEAK}
import octavo
report = octavo.convert(sys.argv[1], sys.argv[2], "fp8_channel", progress=False, prove=sys.argv[3] == "prove")
result(staging_bytes=report.staging_bytes, seconds=report.seconds, peak_bytes=peak_bytes())
"""

LOAD_AS_USERS_DO = f"""{_PEAK}
import importlib
import octavo
held, streaming = [], importlib.import_module("octavo.streaming.stream").Stream
run = streaming.run
def noted(self, *args):
    held.append(int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
    return run(self, *args)
streaming.run = noted
model = octavo.load(sys.argv[1], "fp8_channel", progress=False)
report = model.load_report
result(final_bytes=report.final_bytes, before_bytes=held[0], staging_bytes=report.staging_bytes, seconds=report.seconds,
       peak_bytes=peak_bytes())
"""

IMPORTS = f"""{_PEAK}
import octavo, torch
if sys.argv[2]:
    import transformers
octavo.plan(sys.argv[1], "fp8_channel", model=sys.argv[2] == "model")
result(peak_bytes=peak_bytes())
"""


def make_blocks(layers: int, folder: Path) -> tuple[Path, Path]:
    """The same weights in bf16 and in FP8 blocks."""
    plain, blocks = folder / f"llama3-8b-bare-{layers}", folder / f"llama3-8b-bare-{layers}-blocks"
    if not (blocks / "config.json").is_file():
        make_checkpoint.make("llama3-8b-bare", plain, layers)
        run_fresh(MAKE_BLOCKS, plain, blocks)
    return plain, blocks


def measure_speed(folder: Path, repetitions: int, layers: int) -> dict[str, Any]:
    """Every way in turn; medians, and the ratios to bf16."""
    plain, blocks = make_blocks(layers, folder)
    make_checkpoint.make("llama3-8b-bare", plain, layers)
    sources, out = {"bf16": plain, "blocks": blocks}, folder / "converted"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for number in range(repetitions):
        for name, (source, scheme) in WAYS.items():
            shutil.rmtree(out, ignore_errors=True)
            common.warm(sources[source])
            run = run_fresh(CONVERT, sources[source], out, scheme)
            runs[name].append(run)
            if not number and not run_fresh(VERIFY, out, sources[source])["ok"]:
                raise SystemExit(f"{name}: wrong bytes")
            say(f"{number + 1}/{repetitions} {name:22} {run['call_s']:6.2f} s, {run['cpu_s']:6.2f} s of processors")
    shutil.rmtree(out, ignore_errors=True)
    weights = common.size(plain) // 2
    found = {name: condense(each, common.size(sources[WAYS[name][0]]), weights) for name, each in runs.items()}
    for name, each in found.items():
        each["over_bf16"] = {key: ratios(each, found[BASELINE], key) for key in ("call", "cpu")}
        say(f"{name:22} {each['cpu_ns_a_weight']:.2f} ns of processors a weight; over bf16 {each['over_bf16']}")
    return {"layers": layers, "weights": weights, "threads": THREADS, "ways": found}


def condense(runs: list[dict[str, Any]], source_bytes: int, weights: int) -> dict[str, Any]:
    found: dict[str, Any] = {"source_bytes": source_bytes}
    for key in ("call_s", "cpu_s", "read_thread_s", "quantize_thread_s"):
        found[key] = summary([round(run[key], 3) for run in runs])
    for key in ("call", "cpu"):
        least = min(found[f"{key}_s"]["all"])  # others at work only add to it
        found[f"{key}_ns_a_weight"] = round(least / weights * 1e9, 3)
        found[f"{key}_ns_a_byte"] = round(least / source_bytes * 1e9, 3)
    return found


def ratios(found: dict[str, Any], baseline: dict[str, Any], key: str) -> dict[str, float]:
    names = {"byte": f"{key}_ns_a_byte", "weight": f"{key}_ns_a_weight"}
    return {per: round(found[name] / baseline[name], 3) for per, name in names.items()}


def measure_memory(folder: Path, layers: int) -> dict[str, Any]:
    """Peaks of a conversion and of a load, and what processes that only import what they do have."""
    plain, blocks = make_blocks(layers, folder)
    shutil.rmtree(plain, ignore_errors=True)
    found: dict[str, Any] = {}
    for name, prove in (("convert", ""), ("convert, asking transformers", "prove")):
        shutil.rmtree(folder / "converted", ignore_errors=True)
        converted = run_fresh(CONVERT_AS_USERS_DO, blocks, folder / "converted", prove)
        imports = run_fresh(IMPORTS, blocks, "transformers" if prove else "")
        found[name] = {"source_bytes": common.size(blocks), **converted, "imports": imports}
        tell(name, found[name])
    shutil.rmtree(folder / "converted")
    shutil.rmtree(blocks)
    stack = folder / "mxfp4-stack"
    facts = make_checkpoint.make("mxfp4-stack", stack)
    loaded = run_fresh(LOAD_AS_USERS_DO, stack)
    found["load"] = {"checkpoint": facts, **loaded, "imports": run_fresh(IMPORTS, stack, "model")}
    shutil.rmtree(stack)
    peak = loaded["process"]["peak_anonymous_bytes_sampled"]
    # what the process had when it began to read: imports, and the model without its weights
    found["load"]["anonymous_over_final_and_before_bytes"] = peak - loaded["final_bytes"] - loaded["before_bytes"]
    tell("load", found["load"])
    return found


def tell(name: str, found: dict[str, Any]) -> None:
    for what, run in ((name, found), (f"{name}, imports alone", found["imports"])):
        anonymous = run["process"]["peak_anonymous_bytes_sampled"]
        say(f"{what}: {run['peak_bytes'] / 1e6:,.0f} MB, of which {anonymous / 1e6:,.0f} MB can't be dropped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for checkpoints and outputs (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=5, help="of each conversion (%(default)s)")
    parser.add_argument("--layers", type=int, help="of Llama-3-8B, to try things out")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of speed")
    common.add_result_arguments(parser, "convert_quantized")
    args = parser.parse_args()
    with common.merged("convert_quantized", args) as result:
        if args.memory:
            result.add(measure_memory(args.folder, args.layers or MEMORY_LAYERS), "memory")
        else:
            result.add(measure_speed(args.folder, args.repetitions, args.layers or LAYERS), "speed")


if __name__ == "__main__":
    main()
