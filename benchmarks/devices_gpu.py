"""How long does it take, and how much memory of each, until a checkpoint is a model that is spread over GPUs?

    python benchmarks/devices_gpu.py --folder /dev/shm/octavo-bench                  # page cache warm, for certain
    python benchmarks/devices_gpu.py --models qwen1.5-moe-a2.7b --ways octavo-load octavo-pretrained --repeats 5

Every load is a process of its own. Its ways are `octavo.load` and ``from_pretrained`` with an `OctavoConfig`, both with
the ``device_map`` that is asked for, `octavo.load` to one GPU, and ``from_pretrained`` in bf16 and in transformers' own
FP8, with the same map. Seconds go from the call to `torch.cuda.synchronize` of all GPUs; imports of torch and
transformers come before. Of each GPU, ``final`` is what torch has allocated there at the end, ``over`` the peak beyond
that, and ``reserved`` what its allocator held at the peak. After the clock has stopped, results are compared with the
checkpoint, a forward runs, and ways of octavo must give the same logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import make_checkpoint
from common import ChildError, Merged, run_fresh, say, summary

MODELS = ("qwen3-30b-a3b", "qwen1.5-moe-a2.7b", "llama3-8b")
OCTAVO = ("octavo-load", "octavo-pretrained")
WAYS = (*OCTAVO, "octavo-one-gpu", "transformers-bf16", "transformers-fp8")
MIB, GIB = 1 << 20, 1 << 30
PROMISED_OVER_BYTES = 256 * MIB
PROMISED_RESERVED = 1.02  # of the peak that is allocated

CHILD = """
from pathlib import Path
import devices_gpu
way, folder, scheme, device_map = sys.argv[1:]
result(**devices_gpu.measure(way, Path(folder), scheme, device_map))
"""

# libraries and model code into the page cache, so that the first load is like the others
WARM_UP = """
import octavo, torch
for folder in sys.argv[1:]: octavo.plan(folder, model=True)
result(gpus=torch.cuda.device_count())
"""


# -- one load ---------------------------------------------------------------------------------------------------------


def load_by(way: str, folder: Path, scheme: str, device_map: str) -> Callable[[], Any]:
    """The function to be timed."""
    import torch
    import transformers

    import octavo

    automatic = transformers.AutoModelForCausalLM
    if way == "octavo-load":
        return lambda: octavo.load(folder, scheme, device_map=device_map, progress=False)
    if way == "octavo-one-gpu":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        return lambda: octavo.load(folder, scheme, device, progress=False)
    options: dict[str, Any] = {"device_map": device_map, "dtype": torch.bfloat16}
    if way == "octavo-pretrained":
        options["quantization_config"] = octavo.OctavoConfig(scheme)
    elif way == "transformers-fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config()  # 128 x 128
    return lambda: automatic.from_pretrained(folder, **options)


def measure(way: str, folder: Path, scheme: str, device_map: str) -> dict[str, Any]:
    """Load once, in a process that does nothing else."""
    import torch
    from _checks import Probes, WrongError, check_model

    gpus = range(torch.cuda.device_count())
    probes, load = Probes(folder), load_by(way, folder, scheme, device_map)
    began = time.perf_counter()
    model = load()
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    found: dict[str, Any] = {"load_s": time.perf_counter() - began}
    peaks = [(torch.cuda.max_memory_allocated(gpu), torch.cuda.max_memory_reserved(gpu)) for gpu in gpus]
    gc.collect()
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): (t.device, t.untyped_storage().nbytes()) for t in tensors}
    found["devices"] = {
        f"cuda:{gpu}": {
            "model_bytes": sum(nbytes for device, nbytes in held.values() if device.index == gpu),
            "allocated_final_bytes": torch.cuda.memory_allocated(gpu),
            "allocated_peak_bytes": peak,
            "reserved_peak_bytes": reserved,
        }
        for gpu, (peak, reserved) in zip(gpus, peaks, strict=True)
    }
    found["map"] = {module: str(device) for module, device in getattr(model, "hf_device_map", {}).items()}
    if (report := getattr(model, "load_report", None)) is not None:
        found["stages_s"], found["read_bytes"] = dict(report.seconds), report.read_bytes
        found["source_bytes"] = report.source_bytes
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.arange(8, device=device)[None]).logits.float()
    found["logits"] = [round(value, 4) for value in logits[0, -1, :8].tolist()]
    try:
        return {**found, "check": check_model(model, probes, device)}
    except WrongError as error:
        return {**found, "check": {"wrong": str(error)}}


# -- all loads --------------------------------------------------------------------------------------------------------


def condense(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the median time, all times, and the largest peaks."""
    typical = dict(sorted(runs, key=lambda run: run["load_s"])[(len(runs) - 1) // 2])
    typical["load_s"] = summary([round(run["load_s"], 4) for run in runs])
    typical["devices"] = {
        device: {key: max(run["devices"][device][key] for run in runs) for key in figures}
        for device, figures in typical["devices"].items()
    }
    for figures in typical["devices"].values():
        figures["over_bytes"] = figures["allocated_peak_bytes"] - figures["model_bytes"]
    if wrong := [run["check"]["wrong"] for run in runs if "wrong" in run["check"]]:
        typical["check"] = {"wrong": wrong[0], "times": len(wrong)}
    return typical


def promises(way: str, rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Which promises a way of octavo kept."""
    row = rows[way]
    used = [figures for figures in row["devices"].values() if figures["model_bytes"]]
    kept = {
        "right": "wrong" not in row["check"],
        "spread": len(used) > 1,
        "over": all(figures["over_bytes"] <= PROMISED_OVER_BYTES for figures in used),
        "reserved": all(f["reserved_peak_bytes"] <= PROMISED_RESERVED * f["allocated_peak_bytes"] for f in used),
        "read once": row["read_bytes"] == row["source_bytes"],
    }
    for other, name in (("transformers-bf16", "faster"), ("octavo-one-gpu", "no slower than one GPU")):
        if "load_s" in rows.get(other, {}):
            kept[name] = row["load_s"]["median"] <= rows[other]["load_s"]["median"]
    if "logits" in rows.get("octavo-one-gpu", {}):
        kept["alike"] = row["logits"] == rows["octavo-one-gpu"]["logits"]
    return kept


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a way, and one more for each GPU."""
    lines = [f"{'':22}{'load s':>8}{'final GiB':>11}{'over MiB':>10}{'reserved MiB':>14}"]
    for way, row in rows.items():
        if "load_s" not in row:
            lines.append(f"{way:22}{row['error'].splitlines()[-1][:120]}")
            continue
        lines.append(f"{way:22}{row['load_s']['median']:8.2f}")
        for device, figures in row["devices"].items():
            reserved = figures["reserved_peak_bytes"] - figures["allocated_peak_bytes"]
            lines.append(
                f"  {device:28}{figures['model_bytes'] / GIB:11.2f}{figures['over_bytes'] / MIB:10,.0f}"
                f"{reserved / MIB:14,.0f}"
            )
        if "stages_s" in row:
            lines.append("    " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages_s"].items()))
        if "wrong" in row["check"]:
            lines.append(f"    WRONG: {row['check']['wrong']}")
        if broken := [name for name, held in row.get("promises", {}).items() if not held]:
            lines.append(f"    not as promised: {', '.join(broken)}")
    return "\n".join(lines)


def run_model(model: str, args: argparse.Namespace, merged: Merged) -> bool:
    """All ways to load one model, in turns; False if one of octavo's failed or was wrong."""
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {folder.name}: {facts['bytes'] / 1e9:.2f} GB, {facts['tensors']:,} tensors")
    run_fresh(WARM_UP, folder, timeout_s=args.timeout_s)
    merged.add(facts, "models", folder.name, "checkpoint")
    runs: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for number in range(args.repeats):
        for way in args.ways:
            if "error" in rows.get(way, {}):
                continue
            common.set_cache(folder, cold=False)
            try:
                run = run_fresh(CHILD, way, folder, args.scheme, args.device_map, timeout_s=args.timeout_s)
            except ChildError as error:
                rows[way] = {"error": str(error)[-2000:]}
                continue
            runs.setdefault(way, []).append(run)
            rows[way] = condense(runs[way])
            # at once, should what follows not end
            merged.add(rows[way], "models", folder.name, args.device_map, args.scheme, way)
            stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in run.get("stages_s", {}).items())
            say(f"{number + 1}/{args.repeats} {way:22} {run['load_s']:6.2f} s {stages}")
    for way, row in rows.items():
        if way in OCTAVO and "load_s" in row and args.device_map != "cpu":
            row["promises"] = promises(way, rows)
        merged.add(row, "models", folder.name, args.device_map, args.scheme, way)
    say(table(rows))
    return not any(way in OCTAVO and ("error" in row or "wrong" in row.get("check", {})) for way, row in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS[:1], make_checkpoint.MODELS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--scheme", default="fp8_channel", help="(%(default)s)")
    parser.add_argument("--device-map", default="auto", help="cpu tries the benchmark out (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one process (%(default)s)")
    common.add_result_arguments(parser, "devices_gpu")
    args = parser.parse_args()
    if common.lacks_gpu("devices_gpu", args.device_map, tries_on_cpu=False):
        return
    if args.device_map != "cpu" and (count := run_fresh(WARM_UP)["gpus"]) < 2:
        print(json.dumps({"benchmark": "devices_gpu", "skipped": f"{count} GPU"}))
        return
    with common.merged("devices_gpu", args) as merged:
        right = [run_model(model, args, merged) for model in args.models]
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
