"""How much slower than bf16 is a linear layer with FP8 weights on a CPU, beside other ways to multiply with them?

    python benchmarks/linear_cpu.py

4096 x 4096, one thread, M rows of activations in bf16. The ways: bf16 weights (the limit), octavo's forward for each
scheme, weights widened by torch's own conversion first, and torch's ``_scaled_mm`` (row-wise scales) where it runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import torch
import torch.nn.functional as F

from octavo.numerics import schemes
from octavo.running import linear as matmul

SIDE = 4096


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return round(1000 * statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = (torch.randn(SIDE, SIDE) * 0.02).bfloat16()
    results: dict[str, dict[str, float]] = {}
    for rows in options.rows:
        x = torch.randn(rows, SIDE).bfloat16()
        found = {"bf16": median_ms(lambda x=x: F.linear(x, weight), options.repeats)}
        for name in schemes.SCHEMES:
            q, scale = schemes.quantize(weight, name)
            expected = F.linear(x, schemes.dequantize(q, scale, name, dtype=torch.bfloat16)).float()
            error = (matmul.linear(x, q, scale, name).float() - expected).norm() / expected.norm()
            assert error < 0.01, (name, error)
            found[f"octavo {name}"] = median_ms(
                lambda x=x, q=q, s=scale, n=name: matmul.linear(x, q, s, n), options.repeats
            )
        q, scale = schemes.quantize(weight, "fp8_channel")
        found["q.to(bf16)"] = median_ms(
            lambda x=x, q=q, s=scale: F.linear(x, q.to(torch.bfloat16)) * s.T, options.repeats
        )
        amax = x.abs().amax(-1, keepdim=True).float() / 448
        a = (x.float() / amax).to(schemes.FP8)
        try:
            found["_scaled_mm"] = median_ms(
                lambda a=a, q=q, m=amax, s=scale: torch._scaled_mm(
                    a, q.T, scale_a=m, scale_b=s.T.contiguous(), out_dtype=torch.bfloat16
                ),
                3,
            )
        except RuntimeError as error:
            found["_scaled_mm"] = float("nan")
            common.say(f"_scaled_mm: {str(error).splitlines()[0]}")
        results[str(rows)] = found
        common.say(f"M={rows}: " + ", ".join(f"{k} {v:.1f} ms" for k, v in found.items()))
    values = {"side": SIDE, "threads": 1, "ms": results}
    common.save("linear_cpu", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
