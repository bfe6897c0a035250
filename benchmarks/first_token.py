"""How long from the start of Python to the first token?

    python benchmarks/first_token.py --folder /dev/shm/octavo-bench
    python benchmarks/first_token.py --models llama3-8b --ways bf16 octavo-fp8_channel

Random weights of the shapes of Llama-3-8B and Qwen1.5-MoE-A2.7B, files in the page cache. Each way is two processes,
one after the other, which share folders of compiled kernels and of plans that were empty before the first. ``at_s``
counts from the start of the process: Python runs, torch is imported, the model is loaded, its first token is there, and
a second one for the same prompt, which has nothing to compile.

    bf16, fp8, torchao    from_pretrained: as it is; transformers' own FP8; torchao's, a scale a row
    octavo-SCHEME         octavo.load
    config-SCHEME         from_pretrained with octavo's config

A way that can't run says why.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import common
import make_checkpoint
from common import ChildError, Merged, run_fresh, say

MODELS = ("llama3-8b", "qwen1.5-moe-a2.7b")
WAYS = ("bf16", "octavo-fp8_channel", "octavo-fp8_block", "config-fp8_channel", "torchao", "fp8")

CHILD = """
import _first_token
from pathlib import Path
way, folder, device, prompt = sys.argv[1:]
result(**_first_token.measure(way, Path(folder), device, STARTED_S, int(prompt)))
"""


def measure(way: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A first process and a second one."""
    found = {}
    with tempfile.TemporaryDirectory() as kernels, tempfile.TemporaryDirectory() as plans:
        os.environ |= {"TRITON_CACHE_DIR": kernels, "OCTAVO_CACHE": plans}
        for process in ("first", "second"):
            common.set_cache(folder, cold=False)
            try:
                found[process] = run_fresh(CHILD, way, folder, args.device, args.prompt, timeout_s=args.timeout_s)
            except ChildError as error:
                found[process] = {"error": str(error)[-2000:]}
                break
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A line a process: seconds of each step."""
    lines = []
    for way, processes in rows.items():
        for process, row in processes.items():
            if "error" in row:
                lines.append(f"{way:20}{process:8}{row['error'].splitlines()[-1][:150]}")
                continue
            at = row["at_s"]
            steps = "  ".join(f"{name} {at[name]:.2f}" for name in ("torch", "loaded", "first token", "second token"))
            lines.append(f"{way:20}{process:8}{steps}")
    return "\n".join(lines)


def run_model(model: str, args: argparse.Namespace, merged: Merged) -> None:
    folder = common.model_folder(args.folder, model, args.layers)
    facts = make_checkpoint.make(model, folder, args.layers)
    say(f"== {model}: {facts['bytes'] / 1e9:.2f} GB")
    merged.add(facts, "models", folder.name, "checkpoint")
    rows = {}
    for way in args.ways:
        rows[way] = measure(way, folder, args)
        merged.add({**rows[way], "prompt": args.prompt}, "models", folder.name, way)
        say(table({way: rows[way]}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, MODELS, make_checkpoint.MODELS)
    parser.add_argument("--ways", nargs="+", default=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--prompt", type=int, default=32, help="its tokens (%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cpu tries the benchmark out (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one process (%(default)s)")
    common.add_result_arguments(parser, "first_token")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if common.lacks_gpu("first_token", args.device):
        return
    with common.merged("first_token", args, device=args.device) as merged:
        for model in args.models:
            run_model(model, args, merged)


if __name__ == "__main__":
    main()
