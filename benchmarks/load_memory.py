"""How far over the final model does memory rise while octavo loads it on a CPU, whatever the size of a tensor?

    python benchmarks/load_memory.py

The promise: at most the staging budget (256 MiB) and 64 MiB more. The checkpoints hold a matrix of 1.07 GB, and stacks
of experts of 2.15 GB as one tensor. Each load is a process of its own; its peak is the kernel's own mark (VmHWM),
reset just before the load, so neither imports count nor does sampling miss anything.

    over final      VmHWM - (VmRSS before the load + the bytes of the model)
    over after      VmHWM - VmRSS after it: less, since malloc keeps the staging for later

Both must keep the promise. Beside it, the usual way: `from_pretrained` in bf16, then each weight quantized in turn and
its bf16 form dropped. There, mapped pages of the checkpoint count too, which the kernel can drop when it needs memory;
``anonymous_over_final_bytes`` (sampled) leaves them out.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import common
import make_checkpoint
from common import run_fresh, say

CHECKPOINTS = ("big-tensor", "big-stack", "big-stack-transposed")
SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8")
NAIVE_SCHEME = "fp8_channel"
MIB = 1 << 20
MARGIN_BYTES = 64 * MIB
PLOTTED = ("big-stack", "fp8_channel")
PLOT = common.ROOT / "docs" / "images" / "load_memory.png"

# what both ways share: marks of the kernel, and everything imported that a load of this model imports
_MARKS = """
import re
def memory(key):
    return int(re.search(key + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def reset_peak():
    with open("/proc/self/clear_refs", "w") as file: file.write("5")
import torch, transformers, octavo
from octavo import schemes
octavo.plan(sys.argv[1], sys.argv[2], model=True)
reset_peak()
before, anonymous, began = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
def marks(final_bytes):
    took, after, peak = time.perf_counter() - began, memory("VmRSS"), memory("VmHWM")
    return dict(load_s=took, final_bytes=final_bytes, before_bytes=before, after_bytes=after, peak_bytes=peak,
                over_final_bytes=peak - before - final_bytes, over_after_bytes=peak - after,
                anonymous_before_bytes=anonymous)
"""

OCTAVO = (
    _MARKS
    + """
model = octavo.load(sys.argv[1], sys.argv[2], progress=False)
report = model.load_report
found = marks(report.final_bytes)
report.plot(sys.argv[3]) if len(sys.argv) > 3 else None
result(**found, staging_bytes=report.staging_bytes, threads=report.threads, stages=report.seconds,
       read_over_source=report.read_bytes / report.source_bytes, source_bytes=report.source_bytes,
       sampled_over_final_bytes=report.rss_peak_bytes - report.rss_final_bytes)
"""
)

NAIVE = (
    _MARKS
    + """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
head = model.get_output_embeddings()
for module in model.modules():
    for name, weight in list(module.named_parameters(recurse=False)):
        linear = isinstance(module, torch.nn.Linear) and module is not head and name == "weight"
        if linear or weight.ndim == 3:
            q, scale = schemes.quantize(weight.detach(), sys.argv[2])
            setattr(module, name, torch.nn.Parameter(q, requires_grad=False))
            module.register_buffer(name + "_scale", scale)
            del weight, q
tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
result(**marks(sum(tensors.values())))
"""
)


def judged(values: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """The values with the verdict, and what of the peak was anonymous memory."""
    ideal = values["anonymous_before_bytes"] + values["final_bytes"]
    return {
        **values,
        "anonymous_over_final_bytes": values["process"]["peak_anonymous_bytes_sampled"] - ideal,
        "pass": max(values["over_final_bytes"], values["over_after_bytes"]) <= limit_bytes,
    }


def show(label: str, values: dict[str, Any]) -> None:
    keys = ("final", "over_final", "over_after", "anonymous_over_final")
    sizes = [f"{key.replace('_', ' ')} {values[f'{key}_bytes'] / MIB:,.0f} MiB" for key in keys]
    say(f"{label:44} {', '.join(sizes)}, {values['load_s']:.1f} s, {'pass' if values['pass'] else 'over the limit'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=common.FOLDER, help="for the checkpoints (%(default)s)")
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS, choices=make_checkpoint.MODELS)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--no-naive", action="store_true", help="without the contrast")
    parser.add_argument("--no-save", action="store_true", help="print only; draw nothing")
    parser.add_argument("--remove", action="store_true", help="remove each checkpoint after its use")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    limit_bytes = _staging_default() + MARGIN_BYTES
    results: dict[str, Any] = {}
    for name in args.checkpoints:
        folder = args.folder / name
        facts = make_checkpoint.make(name, folder)
        loads: dict[str, Any] = {}
        for scheme in args.schemes:
            common.warm(folder)
            plot = [PLOT] if (name, scheme) == PLOTTED and not args.no_save else []
            for path in plot:
                path.parent.mkdir(parents=True, exist_ok=True)
            loads[scheme] = judged(run_fresh(OCTAVO, folder, scheme, *plot), limit_bytes)
            show(f"{name} {scheme}", loads[scheme])
        naive = None
        if not args.no_naive:
            common.warm(folder)
            naive = judged(run_fresh(NAIVE, folder, NAIVE_SCHEME), limit_bytes)
            show(f"{name} bf16, then {NAIVE_SCHEME}", naive)
        results[name] = {"checkpoint": facts, "octavo": loads, f"from_pretrained_then_{NAIVE_SCHEME}": naive}
        if args.remove:
            shutil.rmtree(folder)
    verdicts = [load["pass"] for found in results.values() for load in found["octavo"].values()]
    values = {"cache": "warm", "limit_bytes": limit_bytes, "pass": all(verdicts), "checkpoints": results}
    common.save("load_memory", args.folder, values, write=not args.no_save)
    raise SystemExit(0 if all(verdicts) else 1)


def _staging_default() -> int:
    return run_fresh("from octavo.choices import DEFAULT_STAGING_BYTES as n\nresult(staging=n)")["staging"]


if __name__ == "__main__":
    main()
