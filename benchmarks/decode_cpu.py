"""How many tokens a second does a small model answer with on a CPU: in bf16, and with its weights quantized?

    python benchmarks/decode_cpu.py
    python benchmarks/decode_cpu.py --threads 1 4 --schemes int8_channel

SmolLM2-135M, as `octavo demo` prepares it, one prompt. Models take turns, so that whatever else the machine does
meets all of them; each turn is timed from the first new token to the last, and the best of all turns counts.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import torch

import octavo
from octavo.demo.model import prepare
from octavo.numerics import schemes


def seconds(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """The time that so many tokens take after the first."""

    def answer(count: int) -> float:
        began = perf_counter()
        made = model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        assert made.shape[1] == prompt.shape[1] + count
        return perf_counter() - began

    return answer(tokens + 1) - answer(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["int8_channel", "fp8_channel"], choices=list(schemes.SCHEMES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    folder = prepare(progress=common.say)
    models = {"bf16": octavo.load(folder, None, progress=False)}
    models |= {scheme: octavo.load(folder, scheme, progress=False) for scheme in options.schemes}
    prompt = torch.randint(100, 40_000, (1, 32), generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, Any]] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.turns):
            for name, model in models.items():
                times[name].append(seconds(model, prompt, options.tokens))
        found[str(threads)] = {
            name: {
                "tokens_per_s": round(options.tokens / min(taken), 2),
                "median_tokens_per_s": round(options.tokens / statistics.median(taken), 2),
                "over_bf16": round(min(times["bf16"]) / min(taken), 3),
            }
            for name, taken in times.items()
        }
        for name, rate in found[str(threads)].items():
            common.say(f"{threads} threads, {name}: {rate['tokens_per_s']} tokens/s, {rate['over_bf16']} of bf16")
    values = {"model": folder.name, "tokens": options.tokens, "turns": options.turns, "threads": found}
    common.save("decode_cpu", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
