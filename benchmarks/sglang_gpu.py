"""How long does SGLang take until it serves FP8 from a bf16 checkpoint, and how well and fast does it answer then?

    python benchmarks/sglang_gpu.py --folder /dev/shm/octavo-bench
    python benchmarks/sglang_gpu.py --folder /dev/shm/octavo-bench --ways octavo-fp8_channel --tensor-parallel 1 2 2e
    python benchmarks/sglang_gpu.py --folder /dev/shm/octavo-bench --again --graphs
    python benchmarks/sglang_gpu.py --folder /dev/shm/octavo-bench --models llama3-8b --ways octavo-int8_channel

Random weights of the shape of Qwen1.5-MoE-A2.7B. Each way is an engine with processes of its own, one for each GPU
(2e: with experts apart, each whole on one of them):

    bf16             SGLang as it is
    fp8              SGLang's own online quantization: --quantization fp8
    octavo-...       --load-format octavo
    converted-...    SGLang as it is, on the checkpoint that `octavo convert` writes

    load s       of the model runner's ``load_model``: to make the model, fill it, and bring it into the form of kernels
    start s      of `sglang.Engine(...)`, the load in it
    final, over  allocated by torch after the load, and at the peak beyond that; "card" is the most of the whole card
                 until the engine was ready, as the driver counts it, its KV cache included
    prefill      tokens a second of prompts of which one token is asked each
    decode       new tokens a second, for batches; without CUDA graphs unless --graphs

Answers are compared with those of other ways in the same folder: the logprobs of the prompts' own tokens, and greedy
tokens. octavo's must be equal to the converted checkpoint's, parameters included.

A start takes about a minute, imports included, and answers another one where Triton compiles its kernels for the first
time. So ``--load-only`` asks nothing, and ``--no-speed`` answers without timing them.

octavo remembers nothing of what came before, but with ``--again``: then each of its ways starts a second time, with the
plan of the first ("again"; the answers that are compared are those of the second start). The result is written after
each start. One that fails, or takes longer than ``--timeout-s``, is ended with all of its ranks, and the next one
begins; what it had measured by then is in its row, and all that it said in a file beside its answers. One that would
not end within ``--budget-s``, as the ones before it took, is not started, and that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _sglang
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
    plugin_path,
    source_of,
    starts,
    what_is_asked,
)
from common import ChildError, Merged, run_fresh, say

MODELS = ("qwen1.5-moe-a2.7b",)
SCHEMES = ("fp8_channel", "fp8_block", "int8_channel")
OCTAVO = tuple(f"octavo-{scheme}" for scheme in SCHEMES)
CONVERTED = tuple(f"converted-{scheme}" for scheme in SCHEMES)
WAYS = (*OCTAVO, *CONVERTED, "fp8", "bf16")  # what is asked for first, first: there may be no time for the rest
#: of experts, SGLang has int8 on NPUs alone
DEFAULT_WAYS = tuple(way for way in WAYS if not way.endswith("int8_channel"))
GIB = 1 << 30
#: to import SGLang, twice, and to start it
LEAST_S = 45

#: than SGLang's own fp8; beyond what stays
PROMISED_FASTER, PROMISED_OVER_BYTES = 8.0, int(0.3 * GIB)

CHILD = """
from pathlib import Path
import _sglang
way, folder, answers, options = sys.argv[1:]
result(**_sglang.measure(way, Path(folder), Path(answers), json.loads(options), result))
"""


def condense(found: dict[str, Any], source_bytes: int) -> dict[str, Any]:
    """A row of the result; with several ranks, the slowest and the largest."""
    ranks, ready_at = found.pop("ranks"), found.pop("ready_at_s")
    found.pop("doing", None)
    samples = [sample[3] for sample in found.pop("samples") if sample[0] <= ready_at]
    after = [rank["after"] for rank in ranks]
    load_s = max(rank["load_s"] for rank in ranks)
    row = {
        "load_s": round(load_s, 3),
        "gb_per_s": round(source_bytes / load_s / 1e9, 2),
        "final_bytes": max(memory["allocated_bytes"] for memory in after),
        "over_bytes": max(memory["allocated_peak_bytes"] - memory["allocated_bytes"] for memory in after),
        "reserved_share": round(max(m["reserved_peak_bytes"] / max(1, m["allocated_peak_bytes"]) for m in after), 4),
        "card_peak_bytes": max(samples, default=0),
        "log": ranks[0]["log"],
    }
    return {**row, **found}


def promises(way: str, ranks: Ranks, rows: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Which promises a load through octavo kept."""
    row = rows.get(key_of(way, ranks), {})
    if way not in OCTAVO or "load_s" not in row:
        return {}
    kept = {"over": row["over_bytes"] <= PROMISED_OVER_BYTES}
    own = rows.get(key_of("fp8", ranks), {})
    if "load_s" in own:
        kept["faster"] = own["load_s"] >= PROMISED_FASTER * row["load_s"]
    if twin := row.get("against", {}).get(way.replace("octavo", "converted")):
        kept["equal"] = twin["equal"] and twin["equal_parameters"] is not False
    return kept


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a way, and what it says of its answers below."""
    head = ("load s", "GB/s", "start s", "final GiB", "over GiB", "card GiB", "reserved", "prefill/s")
    batches = list(dict.fromkeys(batch for row in rows.values() for batch in row.get("decode", {})))
    lines = [f"{'':34}" + "".join(f"{name:>11}" for name in (*head, *(f"decode {batch}" for batch in batches)))]
    for key, row in rows.items():
        if "load_s" not in row:
            lines.append(f"{key:34}{row.get('skipped') or row['error'].splitlines()[0][:150]}")
            continue
        sizes = [row[name] / GIB for name in ("final_bytes", "over_bytes", "card_peak_bytes")]
        values = [row["load_s"], row["gb_per_s"], row["start_s"], *sizes, row["reserved_share"]]
        cells = "".join(f"{value:11.3f}" for value in values)
        if "prefill" in row:
            speeds = [row["prefill"], *(row["decode"].get(batch, {"tokens_per_s": math.nan}) for batch in batches)]
            cells += "".join(f"{speed['tokens_per_s']:11,.0f}" for speed in speeds)
        lines.append(f"{key:34}{cells}")
        if "error" in row:
            lines.append(f"{'':36}then: {row['error'].splitlines()[0][:150]}")
        for other, found in row.get("against", {}).items():
            same = "equal" if found["equal"] else f"logprobs {found['mean_difference']:.4f} apart"
            parameters = {None: "", True: ", parameters equal", False: ", parameters differ"}[found["equal_parameters"]]
            lines.append(f"{'':36}to {other}: {same}, {found['same_tokens']:.0%} of tokens{parameters}")
        if broken := [name for name, held in row.get("promises", {}).items() if not held]:
            lines.append(f"{'':36}not as promised: {', '.join(broken)}")
    return "\n".join(lines)


def run_model(
    model: str, args: argparse.Namespace, merged: Merged, budget: Budget, used: Callable[[], int] | None
) -> bool:
    """Every way to load a model; whether octavo's answer as they promise."""
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB")
    merged.add(facts, "models", folder.name, "checkpoint")
    rows: dict[str, dict[str, Any]] = {}
    for way, ranks, again in starts(args, OCTAVO):
        key, began = f"{key_of(way, ranks)}{AGAIN * again}", time.perf_counter()
        if again and "load_s" not in rows[key_of(way, ranks)]:
            rows[key] = {"skipped": "the first start failed"}
            continue
        if not again:
            shutil.rmtree(os.environ["OCTAVO_CACHE"], ignore_errors=True)
        rows[key] = run_way(way, ranks, again, folder, facts["bytes"], args, merged, budget, used)
        if "skipped" in rows[key]:
            say(f"{key}: {rows[key]['skipped']}")
            continue
        try:
            judge(rows, args, folder)
        except Exception as error:  # what was measured is not lost with it
            rows[key]["error"] = f"can't be compared: {type(error).__name__}: {error}"
        for done, row in rows.items():  # with what it is compared with now
            if "skipped" not in row:
                merged.add(row, "models", folder.name, done)
        say(f"{key}: {time.perf_counter() - began:.0f} s\n{table({key: rows[key]})}")
        for line in rows[key].get("log", []):
            say(f"    {line}")
    say(table(rows))
    return not any("error" in row or row.get("promises", {}).get("equal") is False for row in rows.values())


def run_way(
    way: str,
    ranks: Ranks,
    again: bool,
    folder: Path,
    source_bytes: int,
    args: argparse.Namespace,
    merged: Merged,
    budget: Budget,
    used: Callable[[], int] | None,
) -> dict[str, Any]:
    """One start, in a process of its own: the row of what was measured, also where something went wrong after it."""
    answers = answers_path(way, ranks, folder, engine_name(args))
    answers.parent.mkdir(exist_ok=True)
    answers.unlink(missing_ok=True)
    options = {
        **what_is_asked(args),
        "answers": not args.load_only,
        "speed": not args.load_only and not args.no_speed,
        "answer": args.answer,
        "repeats": args.repeats,
        "graphs": args.graphs,
        "length": max(args.prefill[1], args.compare[1], args.prompt) + max(args.new, args.answer) + 64,
        "tokens": args.cache_tokens,
        "ranks": ranks.count,
        "experts": ranks.experts,
    }
    free = used() if used else 0
    facts = {"graphs": args.graphs}
    try:
        if budget.timeout_s() is None:
            return {"skipped": budget.why()}
        source = source_of(way, folder, merged, args.timeout_s)
        if (timeout_s := budget.timeout_s()) is None:
            return {"skipped": budget.why()}
        facts["cached"] = round(common.set_cache(source, cold=args.cold), 3)
        began = time.perf_counter()
        how: dict[str, Any] = {"device_used": used, "samples": True, "log": args.log}
        try:
            found = run_fresh(CHILD, way, source, answers, json.dumps(options), timeout_s=timeout_s, **how)
        finally:  # what is ended takes its time, too
            budget.took(time.perf_counter() - began)
        return condense(found, source_bytes) | facts
    except ChildError as error:
        log = answers.with_name(f"{answers.stem}{AGAIN.replace(' ', '-') * again}.log")
        log.write_text(error.output)
        row = {"error": reason(error)}
        say(f"{key_of(way, ranks)}{AGAIN * again}: {row['error']}\nall that it said is in {log}")
        wait_for_memory(used, free)
        if "ranks" in error.found:
            row |= condense({**error.found, "samples": error.samples}, source_bytes)
        return row | facts
    except Exception as error:  # of this one: the others go on
        return {"error": f"{type(error).__name__}: {error}"}


def engine_name(args: argparse.Namespace) -> str:
    """Whose answers are compared: with CUDA graphs, numbers are rounded otherwise."""
    return "sglang-graphs" if args.graphs else "sglang"


_SAID = re.compile(r"\b\w+(Error|Exception): ")


def reason(error: ChildError) -> str:
    """What went wrong, in few lines: how it ended and in which step, and what ranks said first, or last."""
    lines = [line[:500] for line in error.output.splitlines() if not line.startswith("RESULT ")]
    step = error.found.get("doing", "its beginning")
    if error.late_s is not None:
        return "\n".join([f"ended after {error.late_s:.0f} s, during {step}. The last that it said:", *lines[-3:]])
    said = [line for line in lines if _SAID.search(line)]
    return "\n".join([f"failed during {step}: {said[0] if said else 'no error was said'}", *said[1:3], *lines[-8:]])


def wait_for_memory(used: Callable[[], int] | None, before: int, timeout_s: float = 30) -> None:
    """Until the driver has taken back what processes had that were killed: the next one would lack it."""
    ends = time.perf_counter() + timeout_s
    while used and used() > before + GIB and time.perf_counter() < ends:
        time.sleep(0.5)


def judge(rows: dict[str, dict[str, Any]], args: argparse.Namespace, folder: Path) -> None:
    """Compare the answers that there are by now, and look at promises."""
    for way, ranks in [(way, ranks) for ranks in args.tensor_parallel for way in args.ways]:
        row = rows.get(key_of(way, ranks), {})
        if "load_s" in row:
            row["against"] = against(way, ranks, WAYS, folder, engine_name(args))
            row["promises"] = promises(way, ranks, rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    add_arguments(parser, WAYS, DEFAULT_WAYS)
    # the first answer takes as long as kernels do to be compiled, and each eager token some 50 ms
    parser.set_defaults(compare=(2, 256), new=32)
    parser.add_argument("--answer", type=int, default=16, help="tokens that are compared (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed (%(default)s)")
    parser.add_argument("--no-speed", action="store_true", help="compare answers, and time none")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs")
    parser.add_argument("--cache-tokens", type=int, default=16384, help="of the KV cache (%(default)s)")
    common.add_result_arguments(parser, "sglang_gpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if common.lacks_gpu("sglang_gpu", args.device):
        return
    for name, value in _sglang.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    made = str(plugin_path(args.folder, _sglang.PLUGINS, *_sglang.ENTRIES))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [made, os.environ.get("PYTHONPATH")]))
    os.environ["OCTAVO_CACHE"] = str(args.folder / "plans")  # none of the user's
    used = common.device_used() if args.device != "cpu" else None
    budget = Budget(args.budget_s, args.timeout_s, LEAST_S)
    with common.merged("sglang_gpu", args, device=args.device) as merged:
        right = []
        for model in args.models:
            try:
                right.append(run_model(model, args, merged, budget, used))
            except (OSError, ChildError) as error:  # of its checkpoint: there may be room for another
                say(f"{model}: {type(error).__name__}: {error}")
                right.append(False)
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
