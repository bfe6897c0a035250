"""How fast does a model loaded as FP8 answer on a GPU, beside the same model in bf16?

    python benchmarks/generate_gpu.py --folder /dev/shm/octavo-bench
    python benchmarks/generate_gpu.py --models llama3-8b --ways bf16 octavo-fp8_channel --tasks prefill generate

Random weights of the shapes of Llama-3-8B and Qwen1.5-MoE-A2.7B. Each way to load is a process of its own, in which
every task runs after a warm-up:

    prefill     one forward pass over prompts of random tokens; 8192 tokens as one prompt, and as four
    generate    `model.generate`, greedy, 128 new tokens after 32, as users call it
    step        the same steps over a static cache, with nothing in between
    compile     the same through torch.compile (mode reduce-overhead)
    graph       the same as one CUDA graph, replayed

``cosine`` is that of the logits after the prefill with those of bf16 in the same run.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import common
import make_checkpoint
from common import ChildError, Merged, run_fresh, say

MODELS = ("llama3-8b", "qwen1.5-moe-a2.7b")
WAYS = ("bf16", "octavo-fp8_channel", "octavo-fp8_block", "octavo-fp8_tensor", "octavo-mxfp8")
TASKS = ("prefill", "generate", "step", "compile", "graph")

CHILD = """
from pathlib import Path
import _generation
way, folder, device, options = sys.argv[1:]
result(**_generation.measure(way, Path(folder), device, json.loads(options)))
"""


def shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def rates(row: dict[str, Any]) -> dict[str, float | None]:
    """'prefill 1x8192' -> tokens a second; None where it failed."""
    found: dict[str, float | None] = {}
    for task in TASKS:
        if "error" in row.get(task, {}):
            found[task] = None
        for key, value in row.get(task, {}).items():
            if isinstance(value, dict) and "tokens_per_s" in value:
                found[f"{task} {key}"] = value["tokens_per_s"]
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Tokens a second, a column a way to load; in brackets, over bf16."""
    good = {way: rates(row) for way, row in rows.items() if "error" not in row}
    base = good.get("bf16", {})
    lines = [f"{'tokens/s':18}" + "".join(f"{way:>26}" for way in good)]
    for name in dict.fromkeys(name for found in good.values() for name in found):
        line = f"{name:18}"
        for found in good.values():
            value, reference = found.get(name), base.get(name)
            over = f"({value / reference:.2f})" if value and reference else ""
            line += f"{'-' if value is None else f'{value:,.0f}':>18} {over:7}"
        lines.append(line)
    cosines = [row.get("prefill", {}).get("logits", {}).get("cosine") for way, row in rows.items() if way in good]
    lines.append(f"{'cosine to bf16':18}" + "".join(f"{'' if c is None else f'{c:.4f}':>18}{'':8}" for c in cosines))
    for way, row in rows.items():
        for where, found in (("", row), *((f" {task}", row.get(task, {})) for task in TASKS)):
            if "error" in found:
                lines.append(f"{way}{where}: {found['error'].splitlines()[-1][:150]}")
    return "\n".join(lines)


def run_model(model: str, args: argparse.Namespace, merged: Merged) -> None:
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB")
    merged.add(facts, "models", folder.name, "checkpoint")
    reference = args.folder / f"{model}.logits.pt"
    reference.unlink(missing_ok=True)
    options = {
        "tasks": args.tasks,
        "prefill": args.prefill,
        "batches": args.batches,
        "prompt": args.prompt,
        "new": args.new,
        "reference": str(reference),
    }
    rows = {}
    for way in args.ways:
        common.set_cache(folder, cold=False)
        try:
            rows[way] = run_fresh(CHILD, way, folder, args.device, json.dumps(options), timeout_s=args.timeout_s)
            say(f"{way}: {rows[way].pop('process')['wall_s']:.0f} s")
        except ChildError as error:
            rows[way] = {"error": str(error)[-2000:]}
        merged.add({**rows[way], "prompt": args.prompt, "new": args.new}, "models", folder.name, way)
    say(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--prefill", nargs="+", type=shape, default=[(1, 8192), (4, 2048)], metavar="BATCHxLENGTH")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="of the decode (%(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decode (%(default)s)")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode (%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one process (%(default)s)")
    common.add_result_arguments(parser, "generate_gpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if common.lacks_gpu("generate_gpu", args.device):
        return
    with common.merged("generate_gpu", args, device=args.device) as merged:
        for model in args.models:
            run_model(model, args, merged)


if __name__ == "__main__":
    main()
