"""How far over the FP8 model does memory rise while a model loads itself, layer by layer or straight into FP8?

    python benchmarks/layerwise_memory.py

A model in the style of serving engines (stacks of 60 experts, fused attention, weight loaders that narrow and copy;
2.2 GB in bf16, of which a layer's experts are 1.04 GB) takes tensors that are read one by one from a checkpoint:

    direct     octavo.layerwise: writes go straight into FP8
    layer      octavo.layerwise(direct=False): one layer at a time in bf16
    plan       the loader is recorded on headers, then the plan is streamed (staging 256 MiB)
    naive      the whole model in bf16, then layer by layer quantized and replaced

Each is a process of its own. Memory is anonymous memory (RssAnon, sampled every 5 ms): what the kernel can't drop. The
promise: at most the FP8 model, the layer in bf16 (in ``layer``), staging, and the tensors that the loader holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import common
from common import run_fresh, say

MIB = 1 << 20
SCHEME = "fp8_channel"
STAGING_BYTES = 256 * MIB
MARGIN_BYTES = 64 * MIB
PLOT = common.ROOT / "docs" / "images" / "layerwise_memory.png"
WAYS = ("direct", "layer", "plan", "naive")

_COMMON = """
import re, threading
sys.path.insert(0, ROOT + "/tests")
import torch, octavo
from octavo import schemes
from octavo.checkpoint import Checkpoint
from helpers.engine import Model, Shape, checkpoint_shapes
SHAPE = Shape(hidden=2048, inner=1408, heads=16, kv_heads=16, head_dim=128, experts=60, layers=2, vocab=4096)
"""

MAKE = (
    _COMMON
    + """
from safetensors.torch import save_file
block = torch.randn(1 << 22).bfloat16() * 0.02
tensors = {name: block.repeat(-(-torch.Size(s).numel() // len(block)))[: torch.Size(s).numel()].view(s)
           for name, s in checkpoint_shapes(SHAPE, moe=True)}
save_file(tensors, sys.argv[1])
result(nbytes=sum(t.nbytes for t in tensors.values()))
"""
)

LOAD = (
    _COMMON
    + """
way, path, scheme = sys.argv[1:4]
opened = Checkpoint.open(path)
def pairs():
    with open(path, "rb", buffering=0) as file:
        for name, info in opened.tensors.items():
            tensor = torch.empty(info.shape, dtype=torch.bfloat16)
            file.seek(info.offset)
            file.readinto(tensor.view(-1).view(torch.uint8).numpy())
            yield name, tensor
def anonymous():
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
naive = way == "naive"
with torch.device("cpu" if naive else "meta"):
    model = Model(SHAPE, moe=True)
octavo.schemes.quantize(torch.randn(256, 256).bfloat16(), scheme)  # what the first use of everything allocates
before, trace, ended = anonymous(), [], threading.Event()
began = time.perf_counter()
def sample():
    while not ended.wait(0.005):
        trace.append((round(time.perf_counter() - began, 4), anonymous() - before))
sampler = threading.Thread(target=sample)
sampler.start()
if naive:
    model.load_weights(pairs())
    for module in model.modules():
        for leaf, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim == 3 or leaf == "weight" and type(module).__name__ in ("QKV", "RowParallel"):
                q, scale = schemes.quantize(weight.data, scheme)
                setattr(module, leaf, torch.nn.Parameter(q, requires_grad=False))
                module.register_parameter(leaf + "_scale", torch.nn.Parameter(scale, requires_grad=False))
                del weight, q
elif way == "plan":
    session = octavo.layerwise(model, scheme)
    session.stream(session.record(path))
else:
    with octavo.layerwise(model, scheme, direct=way == "direct"):
        model.load_weights(pairs())
took = time.perf_counter() - began
ended.set()
sampler.join()
final = sum(parameter.nbytes for parameter in model.parameters())
check = sum(int(parameter.data.view(torch.uint8).sum(dtype=torch.int64)) for parameter in model.parameters())
result(load_s=took, final_bytes=final, peak_bytes=max(b for _, b in trace), trace=trace[:: max(1, len(trace) // 400)],
       checksum=check, largest_tensor_bytes=max(i.nbytes for i in opened.tensors.values()),
       largest_layer_bytes=60 * 3 * 2048 * 1408 * 2)
"""
)


def _code(code: str) -> str:
    return f"ROOT = {str(common.ROOT)!r}\n{code}"


def judged(way: str, found: dict[str, Any]) -> dict[str, Any]:
    """The values with the bound of the way and the verdict (none for the naive way)."""
    over = found["peak_bytes"] - found["final_bytes"]
    bounds = {
        "direct": STAGING_BYTES + 2 * found["largest_tensor_bytes"],
        "layer": STAGING_BYTES + 2 * found["largest_tensor_bytes"] + found["largest_layer_bytes"],
        "plan": STAGING_BYTES + 2 * found["largest_tensor_bytes"],
    }
    bound = bounds.get(way)
    verdict = None if bound is None else over <= bound + MARGIN_BYTES
    return {**found, "over_final_bytes": over, "bound_over_final_bytes": bound, "pass": verdict}


def plot(results: dict[str, dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    gib = 1 << 30
    colors = {"direct": "tab:blue", "plan": "tab:green", "layer": "tab:orange", "naive": "tab:red"}
    labels = {
        "direct": "straight into FP8",
        "plan": "recorded, then streamed",
        "layer": "layer by layer",
        "naive": "all in bf16, then quantized",
    }
    final = results["direct"]["final_bytes"]
    axes.axhline(final / gib, color="tab:gray", linestyle=":", label="the quantized model")
    for way, found in results.items():
        axes.plot(
            [t for t, _ in found["trace"]], [b / gib for _, b in found["trace"]], color=colors[way], label=labels[way]
        )
    axes.set(xlabel="seconds", ylabel="GiB, anonymous", title="Memory while a model loads itself", ylim=(0, None))
    axes.legend(loc="best")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for the checkpoint (%(default)s)")
    parser.add_argument("--scheme", default=SCHEME)
    parser.add_argument("--no-save", action="store_true", help="print only; draw nothing")
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint afterwards")
    options = parser.parse_args()
    folder = options.folder / "layerwise"
    path = folder / "model.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_fresh(_code(MAKE), path)
    common.warm(folder)
    results = {}
    for way in WAYS:
        results[way] = found = judged(way, run_fresh(_code(LOAD), way, path, options.scheme))
        verdict = {None: "no promise", True: "pass", False: "over the bound"}[found["pass"]]
        over = f"over it at the peak {found['over_final_bytes'] / MIB:,.0f} MiB"
        say(f"{way:8} final {found['final_bytes'] / MIB:,.0f} MiB, {over}, {found['load_s']:.1f} s: {verdict}")
    same = len({found["checksum"] for found in results.values()}) == 1
    if not options.no_save:
        plot(results)
    if options.remove:
        shutil.rmtree(folder)
    verdicts = [found["pass"] for found in results.values() if found["pass"] is not None]
    short = {way: {k: v for k, v in found.items() if k != "trace"} for way, found in results.items()}
    values = {"scheme": options.scheme, "same_bytes": same, "pass": all(verdicts) and same, "ways": short}
    common.save("layerwise_memory", options.folder, json.loads(json.dumps(values)), write=not options.no_save)
    raise SystemExit(0 if values["pass"] else 1)


if __name__ == "__main__":
    main()
