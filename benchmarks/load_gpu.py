"""How long does it take, and how much memory, until a checkpoint is a model on the GPU, beside other loaders?

    python benchmarks/load_gpu.py --folder /dev/shm/octavo-bench                     # page cache warm, for certain
    python benchmarks/load_gpu.py --folder /disk/octavo-bench --models llama3-8b     # read once before
    python benchmarks/load_gpu.py --folder /disk/octavo-bench --models llama3-8b --cold
    python benchmarks/load_gpu.py --models opt-125m --loaders octavo peers --repeats 5
    python benchmarks/load_gpu.py --models qwen3-30b-a3b --loaders octavo-fp8_channel --plans /tmp/plans

Every load is a process of its own that does nothing else, and so a cold one. The same counts for all:

    load s       from the call of the load function to `torch.cuda.synchronize()` after it. `import torch, safetensors,
                 transformers` and the loader's own package come before; model code that the loader imports by itself,
                 the CUDA context, and kernels loaded when first used are in it
    process s    from the start of the process, imports in it
    final, over  allocated by torch at the end, and at the peak beyond that; "reserved" is what its allocator held
                 beyond the peak; "device over" is the peak beyond the end for the whole card as the driver counts it
                 (sampled), for those that bypass torch's allocator
    host         peak over what the process had before the load: anonymous memory, and mapped files (the kernel can drop
                 those). Pinned memory may be in neither

For ceilings, "load s" is the part that repeats, without set-up: pinned memory to the device (`copy`); reading the files
into pinned slots with a thread a core (`read`); both together (`ring`); the same past the page cache (`-direct`); and
what every process pays, the CUDA context (`context`). The others drop each tensor as soon as it is on the device.

octavo plans anew each time, unless it is told where to remember plans: then all loads but the first find theirs.

In the same process, after the clock has stopped, every result is compared with the checkpoint; wrong ones are told.
The driver stays initialised in between, as it does with persistence mode.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _facts
import common
import make_checkpoint
from common import ChildError, Merged, run_fresh, say, summary

MODELS = ("qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "llama3-8b", "opt-125m", "huge-stack", "huge-stack-transposed")
CEILINGS = ("context", "copy", "read", "ring")
DIRECT = ("read-direct", "ring-direct")
OCTAVO = ("octavo-fp8_channel", "octavo-fp8_block", "octavo-fp8_tensor", "octavo-mxfp8")
PEERS = ("transformers-fp8", "transformers-bf16", "safetensors", "instanttensor", "fastsafetensors")
GROUPS = {"ceilings": CEILINGS, "direct": DIRECT, "octavo": OCTAVO, "peers": PEERS}
MIB, GIB = 1 << 20, 1 << 30

CHILD = """
from pathlib import Path
import _measure
way, folder, device, forward = sys.argv[1:]
result(**_measure.measure(way, Path(folder), device, STARTED_S, forward == "forward"))
"""

# libraries and model code into the page cache, compiled Python files written, so that the first load is like the others
WARM_UP = """
import importlib.util
import _measure, octavo, torch
for name in ("instanttensor", "fastsafetensors"):
    if importlib.util.find_spec(name) and sys.argv[2] != "cpu": importlib.import_module(name)
octavo.plan(sys.argv[1], model=True)
one = torch.ones(64, 64, device=sys.argv[2], dtype=torch.bfloat16)
result(sum=float((one @ one).sum()))
"""

#: what is promised on an H100 with a warm cache: model -> (seconds of the load, seconds of its stream)
PROMISED_S = {"qwen1.5-moe-a2.7b": (1.5, 1.0), "qwen3-30b-a3b": (3.0, None)}
PROMISED_OVER_BYTES = 256 * MIB
PROMISED_RESERVED = 1.02  # of the peak that is allocated
PROMISED_FASTER = {"qwen1.5-moe-a2.7b": 4.0}  # than transformers' fp8


# -- one load ---------------------------------------------------------------------------------------------------------


def load_once(way: str, folder: Path, args: argparse.Namespace, used: Callable[[], int] | None) -> dict[str, Any]:
    """One process: its times and peaks."""
    forward = "forward" if args.forward else "no forward"
    options: dict[str, Any] = {"timeout_s": args.timeout_s, "device_used": used, "samples": True}
    found = run_fresh(CHILD, way, folder, args.device, forward, **options)
    samples, began, ended = found.pop("samples"), found.pop("began_at_s"), found.pop("ended_at_s")
    process = found.pop("process")
    before = [sample for sample in samples if sample[0] <= began][-1:]
    loading = [sample for sample in samples if began < sample[0] <= ended]
    after = [sample for sample in samples if ended < sample[0] <= ended + 0.08][:3]  # before the checks
    if before and after:
        span = [*before, *loading, *after]
        found["host_anonymous_bytes"] = max(s[1] for s in span) - before[0][1]
        found["host_mapped_bytes"] = max(s[2] for s in span) - before[0][2]
        if used:
            found["device_peak_bytes"] = max(s[3] for s in span) - samples[0][3]
            found["device_final_bytes"] = after[-1][3] - samples[0][3]
    if "allocated_peak_bytes" in found:
        found["over_bytes"] = found["allocated_peak_bytes"] - found["allocated_final_bytes"]
    if "report" in found:
        found["beyond_stages_s"] = found["load_s"] - sum(found["report"]["seconds"].values())
    return {**found, "cpu_s": process["cpu_s"]}


_SECONDS = (
    "load_s",
    "process_s",
    "imports_s",
    "imports_in_load_s",
    "first_forward_s",
    "setup_s",
    "steady_s",
    "cpu_s",
    "cached_share",
)


def condense(runs: list[dict[str, Any]], data_bytes: int) -> dict[str, Any]:
    """Repetitions of one loader: medians of seconds, largest of bytes; all else from the run with the median time."""
    typical = sorted(runs, key=lambda run: run["load_s"])[(len(runs) - 1) // 2]
    result = dict(typical)
    for key in typical:
        if key in _SECONDS:
            result[key] = summary([round(run[key], 4) for run in runs if key in run])
        elif key.endswith("_bytes"):
            result[key] = max(run[key] for run in runs)
    if "report" in typical:
        result["stages_s"] = {
            stage: [run["report"]["seconds"][stage] for run in runs] for stage in typical["report"]["seconds"]
        }
    wrong = [run["check"]["wrong"] for run in runs if "wrong" in run["check"]]
    if wrong:
        result["check"] = {"wrong": wrong[0], "times": len(wrong)}
    result["gb_per_s"] = round(typical.get("bytes", data_bytes) / typical.get("steady_s", typical["load_s"]) / 1e9, 2)
    return result


# -- what came out ----------------------------------------------------------------------------------------------------


def promises(model: str, way: str, rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Which promises this load kept."""
    row = rows[way]
    kept = {
        "right": "wrong" not in row["check"],
        "over": row["allocated_peak_bytes"] - row["model_bytes"] <= PROMISED_OVER_BYTES,  # the model alone
        "reserved": row["reserved_peak_bytes"] <= PROMISED_RESERVED * row["allocated_peak_bytes"],
    }
    if model in PROMISED_S:
        load_s, stream_s = PROMISED_S[model]
        kept["load"] = row["load_s"]["median"] <= load_s
        if stream_s:
            kept["stream"] = row["report"]["seconds"]["stream"] <= stream_s
    peer = rows.get("transformers-fp8", {})
    if model in PROMISED_FASTER and "load_s" in peer:
        kept["faster"] = peer["load_s"]["median"] >= PROMISED_FASTER[model] * row["load_s"]["median"]
    return kept


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a loader."""
    lines = [
        f"{'':20}{'load s':>8}{'process s':>11}{'GB/s':>7}{'final GiB':>11}{'over MiB':>10}{'reserved':>10}"
        f"{'device over':>13}{'host anon':>11}{'mapped':>9}"
    ]
    for way, row in rows.items():
        if "load_s" not in row:
            lines.append(f"{way:20}{row.get('skipped') or row['error'].splitlines()[-1][:120]}")
            continue
        median_s = row.get("steady_s", row["load_s"])["median"]
        device = row["device_peak_bytes"] - row["device_final_bytes"] if "device_peak_bytes" in row else None
        reserved = row["reserved_peak_bytes"] - row["allocated_peak_bytes"] if "over_bytes" in row else None
        final = row.get("allocated_final_bytes")
        rate = "" if way == "context" else f"{row['gb_per_s']:.1f}"
        lines.append(
            f"{way:20}{median_s:8.2f}{row['process_s']['median']:11.2f}{rate:>7}"
            f"{'' if final is None else f'{final / GIB:.2f}':>11}{_mib(row.get('over_bytes')):>10}{_mib(reserved):>10}"
            f"{_mib(device):>13}{_mib(row.get('host_anonymous_bytes')):>11}{_mib(row.get('host_mapped_bytes')):>9}"
        )
        if "report" in row:
            stages = {**row["report"]["seconds"], "else": row["beyond_stages_s"]}
            split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
            lines.append(f"{'':20}  {split}; {row['imports_in_load_s']['median']:.2f} of it imports")
        if "wrong" in row["check"]:
            lines.append(f"{'':20}  WRONG: {row['check']['wrong']}")
        broken = [name for name, held in row.get("promises", {}).items() if not held]
        if broken:
            lines.append(f"{'':20}  not as promised: {', '.join(broken)}")
    return "\n".join(lines)


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / MIB:,.0f}"


# -- all loads --------------------------------------------------------------------------------------------------------


class Budget:
    """Leaves out what would not end in time."""

    def __init__(self, seconds: float | None) -> None:
        self._ends = time.monotonic() + seconds if seconds else None
        self._took: dict[str, float] = {}
        self.left_out: list[str] = []

    def allows(self, what: str, key: str) -> bool:
        expected = self._took.get(key, max(self._took.values(), default=0.0))
        if self._ends is None or time.monotonic() + expected < self._ends:
            return True
        self.left_out.append(what)
        say(f"{what}: left out, no time")
        return False

    def took(self, key: str, seconds: float) -> None:
        self._took[key] = max(seconds, self._took.get(key, 0.0))


def missing(way: str) -> str | None:
    if way in ("instanttensor", "fastsafetensors") and importlib.util.find_spec(way) is None:
        return "not installed"
    return None


def run_model(
    model: str, args: argparse.Namespace, merged: Merged, budget: Budget, used: Callable[[], int] | None
) -> bool:
    """All loaders of one model, in turns; False if octavo failed or was wrong."""
    folder = common.model_folder(args.folder, model, args.layers)
    name = folder.name  # says so where it is not all of the model's layers
    began = time.monotonic()
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {name}: {facts['bytes'] / 1e9:.2f} GB, {facts['tensors']:,} tensors, {time.monotonic() - began:.0f} s")
    kind = _facts.file_system(folder)
    setting = kind if kind in common.IN_MEMORY else f"{kind}, {'cold' if args.cold else 'warm'}"
    run_fresh(WARM_UP, folder, args.device, timeout_s=args.timeout_s)
    merged.add(facts, "models", name, "checkpoint")
    runs: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for number in range(args.repeats):
        for way in args.loaders:
            if rows.get(way, {}).keys() & {"skipped", "error"}:
                continue
            if why := missing(way):
                rows[way] = {"skipped": why}
            elif budget.allows(f"{name} {way} {number + 1}/{args.repeats}", f"{name} {way}"):
                began = time.monotonic()
                cached = common.set_cache(folder, args.cold)
                try:
                    run = {**load_once(way, folder, args, used), "cached_share": cached}
                except ChildError as error:
                    rows[way] = {"error": str(error)[-2000:]}
                else:
                    runs.setdefault(way, []).append(run)
                    rows[way] = condense(runs[way], facts["bytes"])
                    say(f"{number + 1}/{args.repeats} {way:20} {run.get('steady_s', run['load_s']):6.2f} s")
                budget.took(f"{name} {way}", time.monotonic() - began)
            if way in rows:
                merged.add(rows[way], "models", name, "settings", setting, way)
    promised = args.device != "cpu" and not args.cold
    for way, row in rows.items():
        if promised and way in OCTAVO and "over_bytes" in row:
            row["promises"] = promises(name, way, rows)
            merged.add(row, "models", name, "settings", setting, way)
    say(table(rows))
    if args.remove:
        shutil.rmtree(folder)
    return not any(way in OCTAVO and ("error" in row or "wrong" in row.get("check", {})) for way, row in rows.items())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    every = [*GROUPS, *CEILINGS, *DIRECT, *OCTAVO, *PEERS]
    parser.add_argument("--loaders", nargs="+", choices=every, metavar="LOADER", help=f"some of: {', '.join(every)}")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each load")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    parser.add_argument("--plans", type=Path, help="a folder, empty at first, in which octavo remembers its plans")
    parser.add_argument("--no-forward", dest="forward", action="store_false", help="don't run the model once")
    parser.add_argument("--timeout-s", type=float, default=180, help="for one process (%(default)s)")
    parser.add_argument("--budget-s", type=float, help="start nothing that would not end by then")
    parser.add_argument("--remove", action="store_true", help="remove each checkpoint after its use")
    common.add_result_arguments(parser, "load_gpu")
    args = parser.parse_args()
    chosen = args.loaders or ["ceilings", *(["direct"] if args.cold else []), "octavo", "peers"]
    args.loaders = list(dict.fromkeys(way for name in chosen for way in GROUPS.get(name, (name,))))
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OCTAVO_CACHE"] = str(args.plans or os.devnull)
    if args.cold and _facts.file_system(args.folder) in common.IN_MEMORY:
        parser.error(f"--cold: {args.folder} is in memory; give a --folder on a disk")
    return args


def main() -> None:
    args = arguments()
    if common.lacks_gpu("load_gpu", args.device):
        return
    budget, used = Budget(args.budget_s), common.device_used() if args.device != "cpu" else None
    merged = Merged("load_gpu", args.folder, args.output, write=not args.no_save, device=args.device)
    right = [run_model(model, args, merged, budget, used) for model in args.models]
    merged.close(left_out=budget.left_out)
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
