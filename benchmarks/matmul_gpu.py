"""How fast are FP8 linear layers and experts on a GPU, beside bf16, from one token to 8192?

    python benchmarks/matmul_gpu.py

Linear layers of Llama-3-8B against `F.linear`, experts of Qwen1.5-MoE and Qwen3-30B against transformers' grouped bf16
experts. Each is timed twice: *eager*, calls one after another with the host's work in it, and *graph*, the same calls
replayed as a CUDA graph: what the GPU takes. Calls rotate among as many weights as are larger than the L2 cache
together. Results are compared with the dequantized reference before they are timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from octavo.numerics import schemes
from octavo.running import modules

LINEARS = {
    "Llama-3-8B o_proj": (4096, 4096),
    "Llama-3-8B up_proj": (14336, 4096),
    "Llama-3-8B down_proj": (4096, 14336),
}
EXPERTS = {"Qwen1.5-MoE-A2.7B": (60, 2048, 1408, 4), "Qwen3-30B-A3B": (128, 2048, 768, 8)}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
WEIGHTS_BYTES = 200e6  # of FP8, rotated among: four times the L2 cache
Calls = Sequence[Callable[[], Any]]


def eager_us(calls: Calls, repeats: int) -> float:
    """Microseconds a call, of calls that are not waited for one by one."""
    for call in calls:
        call()
    times = []
    each = max(len(calls), 16 // len(calls) * len(calls))
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = perf_counter()
        for i in range(each):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        times.append((perf_counter() - began) / each)
    return 1e6 * statistics.median(times)


def graph_us(calls: Calls, repeats: int) -> float:
    """Microseconds a call of the GPU's time, replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return 1000 * statistics.median(times) / len(calls)


def measure(calls: Calls, repeats: int) -> dict[str, float]:
    return {"eager_us": round(eager_us(calls, repeats), 1), "graph_us": round(graph_us(calls, repeats), 1)}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def random_weight(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)


def quantized_linear(weight: Tensor, scheme: str) -> modules.QuantizedLinear:
    layer = modules.QuantizedLinear(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"), scheme)
    for name, tensor in zip(("weight", "weight_scale"), schemes.quantize(weight, scheme), strict=True):
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


def linears(shape: tuple[int, int], rows: list[int], names: list[str], repeats: int) -> dict[str, Any]:
    copies = max(2, int(WEIGHTS_BYTES // (shape[0] * shape[1])))
    weights = [random_weight(*shape) for _ in range(copies)]
    results: dict[str, Any] = {str(m): {} for m in rows}
    inputs = {m: torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16) for m in rows}
    for m, x in inputs.items():
        results[str(m)]["bf16"] = measure([lambda x=x, w=w: F.linear(x, w) for w in weights], repeats)
    for name in names:
        layers = [quantized_linear(weight, name) for weight in weights]
        exact = schemes.dequantize(layers[0].weight, layers[0].weight_scale, name)
        for m, x in inputs.items():
            found = error(layers[0](x), x.float() @ exact.T)
            assert found < 0.05, (name, m, found)
            times = measure([lambda x=x, layer=layer: layer(x) for layer in layers], repeats)
            results[str(m)][name] = {**times, "error": round(found, 4)}
    return results


class Experts(nn.Module):
    """As transformers' experts are, in bf16."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = True, False, False, False
        self._is_expert_parallel = False
        self.gate_up_proj = nn.Parameter(random_weight(experts, 2 * inner, hidden), requires_grad=False)
        self.down_proj = nn.Parameter(random_weight(experts, hidden, inner), requires_grad=False)

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return grouped_mm_experts_forward(self, x, index, weights)


def quantized_experts(like: Experts, scheme: str) -> Experts:
    """An FP8 copy of the stacks, and the dequantized ones for comparison."""
    experts = Experts(1, 16, 16)
    experts.num_experts = like.num_experts
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(like, name)
        rows = stack.shape[1]
        parts = (rows // 2, rows // 2) if name == "gate_up_proj" else (rows,)
        q, scale = schemes.quantize(stack.data, scheme, parts)
        modules.quantize_stack(experts, name, scheme, tuple(stack.shape), parts)
        setattr(experts, name, nn.Parameter(q, requires_grad=False))
        setattr(experts, f"{name}_scale", nn.Parameter(scale, requires_grad=False))
    return experts


def experts_of(shape: tuple[int, int, int, int], rows: list[int], names: list[str], repeats: int) -> dict[str, Any]:
    count, hidden, inner, top_k = shape
    bf16 = Experts(count, hidden, inner)
    results: dict[str, Any] = {str(m): {} for m in rows}
    inputs = {}
    for m in rows:
        x = torch.randn(m, hidden, device="cuda", dtype=torch.bfloat16)
        # four routings in turn, so that few tokens find other experts each time
        routed = [torch.rand(m, count, device="cuda").topk(top_k, -1) for _ in range(4)]
        inputs[m] = [(x, found.indices, found.values) for found in routed]
        results[str(m)]["bf16"] = measure([lambda i=i: bf16(*i) for i in inputs[m]], repeats)
    for name in names:
        layer = quantized_experts(bf16, name)
        for m, routings in inputs.items():
            found = error(layer(*routings[0]), bf16(*routings[0]))
            assert found < 0.1, (name, m, found)  # the weights' own error is in it
            times = measure([lambda i=i, layer=layer: layer(*i) for i in routings], repeats)
            results[str(m)][name] = {**times, "error": round(found, 4)}
    return results


def table(title: str, results: dict[str, Any], names: list[str]) -> None:
    common.say(f"\n{title}: µs of bf16 (eager/graph), then times as fast as it")
    for m, found in results.items():
        bf16 = found["bf16"]
        cells = [
            f"{name} {bf16['eager_us'] / found[name]['eager_us']:.2f}/{bf16['graph_us'] / found[name]['graph_us']:.2f}"
            for name in names
        ]
        common.say(f"  {m:>5} {bf16['eager_us']:8.1f}/{bf16['graph_us']:8.1f}  " + "  ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--schemes", nargs="+", default=list(schemes.SCHEMES))
    parser.add_argument("--only", nargs="+", default=[*LINEARS, *EXPERTS], help="shapes, by name")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    if common.lacks_gpu("matmul_gpu", tries_on_cpu=False):
        return
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with torch.no_grad():
        for name in options.only:
            function, shape = (linears, LINEARS[name]) if name in LINEARS else (experts_of, EXPERTS[name])
            results[name] = function(shape, options.rows, options.schemes, options.repeats)  # type: ignore[operator]
            table(name, results[name], options.schemes)
            torch.cuda.empty_cache()
    values = {
        "gpu": torch.cuda.get_device_name(),
        "shapes": {name: {**LINEARS, **EXPERTS}[name] for name in options.only},
        "results": results,
    }
    common.save("matmul_gpu", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
