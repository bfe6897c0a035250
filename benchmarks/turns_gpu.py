"""How fast is a model loaded as FP8 called from Python, beside the same model in bf16, in turns?

    python benchmarks/turns_gpu.py --folder /dev/shm/octavo-bench
    python benchmarks/turns_gpu.py --models llama3-8b --layers 8 --ways bf16 octavo-fp8_channel

Random weights of the shapes of Llama-3-8B and Qwen1.5-MoE-A2.7B. All ways are in one process, on one GPU, and each call
of one is followed by the same call of the next: hosts are not alike from minute to minute, and eager calls are the
host's work. Told are medians, and the median and the quartiles of bf16's time over that of a way in the same turn.

    prefill     one forward pass over prompts of random tokens
    decode      eight steps of as many sequences, after a prompt of 32 tokens
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import common
import make_checkpoint
from common import ChildError, Merged, run_fresh, say
from generate_gpu import shape

MODELS = ("llama3-8b", "qwen1.5-moe-a2.7b")
WAYS = ("bf16", "octavo-fp8_channel", "octavo-fp8_block")

CHILD = """
from pathlib import Path
import _generation
folder, device, options = sys.argv[1:]
result(**_generation.in_turns(Path(folder), device, json.loads(options)))
"""


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a call in bf16, and how many times as fast the others are."""
    lines = []
    for task, found in rows.items():
        faster = "  ".join(
            f"{way} {row['faster']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})"
            for way, row in found.items()
            if way != "bf16"
        )
        lines.append(f"{task:18}{found['bf16']['ms']:9.2f} ms  {faster}")
    return "\n".join(lines)


def run_model(model: str, args: argparse.Namespace, merged: Merged) -> None:
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB")
    merged.add(facts, "models", folder.name, "checkpoint")
    options = {name: getattr(args, name) for name in ("ways", "prefill", "batches", "prompt", "turns")}
    common.set_cache(folder, cold=False)
    try:
        found = run_fresh(CHILD, folder, args.device, json.dumps(options), timeout_s=args.timeout_s)
    except ChildError as error:
        say(f"{model}: {str(error)[-2000:]}")
        merged.add({"error": str(error)[-2000:]}, "models", folder.name, "tasks")
        return
    say(f"{found['process']['wall_s']:.0f} s\n{table(found['tasks'])}")
    merged.add({"turns": args.turns, **found["tasks"]}, "models", folder.name, "tasks")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help="bf16 first (%(default)s)")
    default = [(1, 128), (1, 512), (1, 2048), (4, 2048)]
    parser.add_argument("--prefill", nargs="+", type=shape, default=default, metavar="BATCHxLENGTH")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256], help="of the decode (%(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decode (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one model (%(default)s)")
    common.add_result_arguments(parser, "turns_gpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if common.lacks_gpu("turns_gpu", args.device):
        return
    with common.merged("turns_gpu", args, device=args.device) as merged:
        for model in args.models:
            run_model(model, args, merged)


if __name__ == "__main__":
    main()
