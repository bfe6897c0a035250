"""How many tokens a second does a small model answer with on a CPU: in bf16, and with its weights quantized?

    python benchmarks/decode_cpu.py
    python benchmarks/decode_cpu.py --threads 1 4 --schemes int8_channel

SmolLM2-135M, as `octavo demo` prepares it, one prompt. Models take turns, so that whatever else the machine does
meets all of them. Each new token after the second is timed by itself, in seconds of the clock, and in seconds of this
thread, which say more on a busy machine. The least of all turns counts, beside the median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import common
import torch

import octavo
from octavo.demo.model import prepare
from octavo.numerics import schemes


class Times:
    """A streamer that `generate` gives each token to: when it did."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.thread: list[float] = []

    def put(self, _: Any) -> None:
        self.clock.append(perf_counter())
        self.thread.append(thread_time())

    def end(self) -> None:
        pass


def differences(times: list[float]) -> list[float]:
    """What each token took, but for the prompt, which comes first, and the two that follow it."""
    return [later - earlier for earlier, later in itertools.pairwise(times[2:])]


def rates(of: dict[str, list[float]], prefix: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            f"{prefix}tokens_per_s": round(1 / min(taken), 2),
            f"{prefix}median_tokens_per_s": round(1 / statistics.median(taken), 2),
            f"{prefix}over_bf16": round(min(of["bf16"]) / min(taken), 3),
            f"{prefix}median_over_bf16": round(statistics.median(of["bf16"]) / statistics.median(taken), 3),
        }
        for name, taken in of.items()
    }


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
        clock: dict[str, list[float]] = {name: [] for name in models}
        thread: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(options.turns):
            for name, model in models.items():
                times, count = Times(), options.tokens
                model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=times)
                clock[name] += differences(times.clock)
                thread[name] += differences(times.thread)
        by_thread = rates(thread, "thread_") if threads == 1 else {}
        found[str(threads)] = {name: {**rate, **by_thread.get(name, {})} for name, rate in rates(clock, "").items()}
        for name, rate in found[str(threads)].items():
            common.say(f"{threads} threads, {name}: " + ", ".join(f"{key} {value}" for key, value in rate.items()))
    values = {"model": folder.name, "tokens": options.tokens, "turns": options.turns, "threads": found}
    common.save("decode_cpu", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
