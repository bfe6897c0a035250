"""How long does vLLM take until it serves FP8 from a bf16 checkpoint, and how well and fast does it answer then?

    python benchmarks/vllm_gpu.py --folder /dev/shm/octavo-bench
    python benchmarks/vllm_gpu.py --folder /dev/shm/octavo-bench --ways octavo-fp8_channel --tensor-parallel 1 2 2e
    python benchmarks/vllm_gpu.py --folder /dev/shm/octavo-bench --ways octavo-fp8_channel --tensor-parallel 1 2 --again

Random weights of the shape of Qwen1.5-MoE-A2.7B. Each way is an engine in a process of its own, or one for each GPU
(2e: with experts apart, each whole on one of them):

    bf16            vLLM as it is
    fp8_per_...     vLLM's own online quantization: --quantization fp8_per_tensor, fp8_per_channel, fp8_per_block
    octavo-...      --load-format octavo
    converted-...   vLLM as it is, on the checkpoint that `octavo convert` writes

    load s       of the loader's ``load_model``, in the worker: to make the model, fill it ("weights"), and bring
                 weights into the form of the kernels ("process")
    start s      of `vllm.LLM(...)`, the load in it: profiling and capturing graphs, mostly
    final, over  allocated by torch after the load, and at the peak beyond that; "reserved" is what torch's allocator
                 held at most, beyond the peak of what was allocated
    prefill      tokens a second of prompts of which one token is asked each, all in one step
    decode       new tokens a second, for batches; in CUDA graphs (without torch.compile) unless --eager

Answers are compared with those of other ways in the same folder: the logprobs of the prompts' own tokens, and greedy
tokens. octavo's must be equal to the converted checkpoint's, parameters included.

octavo remembers nothing of what came before, but with ``--again``: then each of its ways starts a second time, with the
plan of the first ("again"; the answers that are compared are those of the second start).

vLLM need not find octavo installed: the plugin is made known through PYTHONPATH. Unless it is set, the environment
variable VLLM_USE_DEEP_GEMM is 0, since DeepGEMM compiles its kernels for minutes. ``--device cpu`` tries the benchmark
out, with the ways that vLLM can go there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import _vllm
import common
import make_checkpoint
from _engines import (
    AGAIN,
    Budget,
    Ranks,
    add_arguments,
    against,
    answers_path,
    key_of,
    plugin_is_known,
    plugin_path,
    source_of,
    starts,
    what_is_asked,
)
from common import ChildError, Merged, run_fresh, say

MODELS = ("qwen1.5-moe-a2.7b",)
SCHEMES = ("fp8_channel", "fp8_block", "int8_channel", "int8_channel_w8a16", "nvfp4")
ONLINE = ("fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
OCTAVO = tuple(f"octavo-{scheme}" for scheme in SCHEMES)
CONVERTED = tuple(f"converted-{scheme}" for scheme in SCHEMES)
WAYS = ("bf16", *ONLINE, *OCTAVO, *CONVERTED)
DEFAULT_WAYS = ("octavo-fp8_channel", "fp8_per_tensor", "octavo-fp8_block", "bf16", "fp8_per_block")
GIB = 1 << 30

SECONDS = ("load_s", "make_s", "weights_s", "process_s")
#: than fp8_per_tensor on one GPU, and on several; of the device; of the peak
PROMISED_FASTER, PROMISED_FASTER_TOGETHER = 3.0, 2.5
PROMISED_OVER_BYTES, PROMISED_RESERVED = GIB // 4, 1.02
#: of the time that one GPU takes, with two
PROMISED_SHARE = 0.65


CHILD = """
from pathlib import Path
import _vllm
way, folder, answers, options = sys.argv[1:]
result(**_vllm.measure(way, Path(folder), Path(answers), json.loads(options)))
"""

# -- one way ----------------------------------------------------------------------------------------------------------


def condense(found: dict[str, Any], source_bytes: int) -> dict[str, Any]:
    """A row of the result; with several ranks, the slowest and the largest."""
    ranks = found.pop("ranks")
    row = {key: round(max(rank[key] for rank in ranks), 3) for key in SECONDS if key in ranks[0]}
    row |= {key: [rank[key] for rank in ranks] for key in ("read_bytes", "forecast_bytes") if key in ranks[0]}
    after = [rank["after"] for rank in ranks]
    row |= {
        "gb_per_s": round(source_bytes / row["load_s"] / 1e9, 2),
        "final_bytes": max(memory["allocated_bytes"] for memory in after),
        "over_bytes": max(memory["allocated_peak_bytes"] - memory["allocated_bytes"] for memory in after),
        "reserved_over_bytes": max(memory["reserved_peak_bytes"] - memory["allocated_bytes"] for memory in after),
        "reserved_share": round(max(m["reserved_peak_bytes"] / max(1, m["allocated_peak_bytes"]) for m in after), 4),
        "rss_after_load_bytes": max(rank["rss_bytes"] for rank in ranks),
        "log": ranks[0]["log"],
    }
    return {**row, **found}


# -- what came out ----------------------------------------------------------------------------------------------------


def promises(way: str, ranks: Ranks, rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Which promises a load through octavo kept."""
    row, kept = rows[key_of(way, ranks)], {}
    if way not in OCTAVO or "load_s" not in row:
        return kept
    kept["over"] = row["over_bytes"] <= PROMISED_OVER_BYTES
    kept["reserved"] = row["reserved_share"] <= PROMISED_RESERVED
    if "read_bytes" in row:
        kept["read as forecast"] = row["read_bytes"] == row["forecast_bytes"]
    own, alone = rows.get(key_of("fp8_per_tensor", ranks), {}), rows.get(key_of(way, Ranks(1)), {})
    if "load_s" in own:
        faster = PROMISED_FASTER if ranks.count == 1 else PROMISED_FASTER_TOGETHER
        kept["faster"] = own["load_s"] >= faster * row["load_s"]
    if "load_s" in alone and ranks.count > 1:
        kept["faster together"] = row["load_s"] <= PROMISED_SHARE * alone["load_s"]
    twin = row.get("against", {}).get(way.replace("octavo", "converted"))
    if twin:
        kept["equal"] = twin["equal"] and twin["equal_parameters"] is not False
    return kept


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a way, and what it says of its answers below."""
    head = ("load s", "make", "weights", "process", "GB/s", "start s", "final GiB", "over GiB", "reserved", "prefill/s")
    batches = list(dict.fromkeys(batch for row in rows.values() for batch in row.get("decode", {})))
    lines = [f"{'':26}" + "".join(f"{name:>11}" for name in (*head, *(f"decode {batch}" for batch in batches)))]
    for key, row in rows.items():
        if "load_s" not in row:
            lines.append(f"{key:26}{row.get('skipped') or row['error'].splitlines()[-1][:150]}")
            continue
        values = [*(row.get(key, math.nan) for key in SECONDS), row["gb_per_s"], row["start_s"]]
        values += [row["final_bytes"] / GIB, row["over_bytes"] / GIB]
        cells = "".join(f"{value:11.2f}" for value in values) + f"{row['reserved_share']:11.3f}"
        if "prefill" in row:
            speeds = [row["prefill"], *(row["decode"][batch] for batch in batches if batch in row["decode"])]
            cells += "".join(f"{speed['tokens_per_s']:11,.0f}" for speed in speeds)
        lines.append(f"{key:26}{cells}")
        for other, found in row.get("against", {}).items():
            same = "equal" if found["equal"] else f"logprobs {found['mean_difference']:.4f} apart"
            lines.append(
                f"{'':28}to {other}: {same}, correlation {found['correlation']:.4f}, "
                f"{found['same_tokens']:.0%} of tokens, {found['same_first_tokens']:.0%} of first ones"
            )
        broken = [name for name, held in row.get("promises", {}).items() if not held]
        if broken:
            lines.append(f"{'':28}not as promised: {', '.join(broken)}")
    return "\n".join(lines)


# -- running ----------------------------------------------------------------------------------------------------------


def run_way(
    way: str, source: Path, answers: Path, options: dict[str, Any], timeout_s: float, log: bool
) -> dict[str, Any]:
    return run_fresh(CHILD, way, source, answers, json.dumps(options), timeout_s=max(1, timeout_s), log=log)


def run_model(model: str, args: argparse.Namespace, merged: Merged, budget: Budget) -> bool:
    """Every way to load a model; whether octavo's kept what they promise of their answers."""
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB")
    merged.add(facts, "models", folder.name, "checkpoint")
    options = {
        **what_is_asked(args),
        "graphs": not args.eager and args.device != "cpu",
        "length": args.prefill[1] + 64,
        "cache_bytes": int(args.cache_gib * GIB),
    }
    rows: dict[str, dict[str, Any]] = {}
    for way, ranks, again in starts(args, OCTAVO):
        key = f"{key_of(way, ranks)}{AGAIN * again}"
        began, timeout_s = time.perf_counter(), budget.timeout_s()
        if not again:
            shutil.rmtree(os.environ["OCTAVO_CACHE"], ignore_errors=True)
        answers = answers_path(way, ranks, folder)
        answers.parent.mkdir(exist_ok=True)
        answers.unlink(missing_ok=True)
        if timeout_s is None:
            rows[key] = {"skipped": "no time was left"}
            continue
        try:
            source = source_of(way, folder, merged, timeout_s)
            # converting writes past the page cache
            cached = common.set_cache(source, cold=args.cold)
            try:
                found = run_way(
                    way,
                    source,
                    answers,
                    {**options, "ranks": ranks.count, "experts": ranks.experts},
                    timeout_s,
                    args.log,
                )
            except ChildError as error:
                if not options["graphs"] or any("load_s" in row for row in rows.values()):
                    raise
                say(f"{key}: {error}\nno way has gone well yet: all without CUDA graphs, then")
                options["graphs"] = False
                left_s = timeout_s - (time.perf_counter() - began)
                found = run_way(
                    way, source, answers, {**options, "ranks": ranks.count, "experts": ranks.experts}, left_s, args.log
                )
            rows[key] = condense(found, facts["bytes"]) | {"graphs": options["graphs"], "cached": round(cached, 3)}
        except ChildError as error:
            rows[key] = {"error": str(error)[-3000:]}
            say(f"{key}: {rows[key]['error']}")
        judge(rows, args, folder)
        budget.took(time.perf_counter() - began)
        merged.add(rows[key], "models", folder.name, key)
        say(f"{key}: {time.perf_counter() - began:.0f} s\n{table({key: rows[key]})}")
        for line in rows[key].get("log", []):
            say(f"    {line}")
    for key, row in rows.items():  # which may have been compared with ways that came later
        if "skipped" not in row:  # what an earlier run measured is better than nothing
            merged.add(row, "models", folder.name, key)
    say(table(rows))
    if args.remove:
        for made in args.folder.glob(f"{folder.name}*"):
            shutil.rmtree(made)
    return not any("error" in row or row.get("promises", {}).get("equal") is False for row in rows.values())


def judge(rows: dict[str, dict[str, Any]], args: argparse.Namespace, folder: Path) -> None:
    """Compare the answers that there are by now, and look at promises."""
    for way, ranks in [(way, ranks) for ranks in args.tensor_parallel for way in args.ways]:
        row = rows.get(key_of(way, ranks), {})
        if "load_s" in row:
            row["against"] = against(way, ranks, WAYS, folder)
            row["promises"] = promises(way, ranks, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    add_arguments(parser, WAYS, DEFAULT_WAYS)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--cache-gib", type=float, default=4.0, help="KV cache (%(default)s)")
    parser.add_argument("--remove", action="store_true", help="remove each checkpoint after its use")
    common.add_result_arguments(parser, "vllm_gpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if common.lacks_gpu("vllm_gpu", args.device):
        return
    for name, value in {**_vllm.ENVIRONMENT, "VLLM_USE_DEEP_GEMM": "0"}.items():
        os.environ.setdefault(name, value)
    if not plugin_is_known(_vllm.PLUGINS):
        made = str(plugin_path(args.folder, _vllm.PLUGINS, _vllm.PLUGIN))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [made, os.environ.get("PYTHONPATH")]))
    os.environ["OCTAVO_CACHE"] = str(args.folder / "plans")  # none of the user's
    budget = Budget(args.budget_s, args.timeout_s)
    with common.merged("vllm_gpu", args, device=args.device) as merged:
        right = [run_model(model, args, merged, budget) for model in args.models]
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
