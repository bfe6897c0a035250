"""The page of loads: to a GPU beside other loaders, where a stream's seconds go, and memory on a CPU."""

from __future__ import annotations

import operator
import statistics
from typing import Any

from .results import MIB, SCHEMES, Result, Sources, each, load, mib, page, pictures, seconds, table

_CEILINGS = {
    "copy": "pinned memory to the device, alone",
    "read": "reading into pinned memory, alone",
    "read-direct": "reading past the page cache, alone",
    "ring": "reading and copying, alone",
    "ring-direct": "reading past the page cache and copying, alone",
}
_PEERS = {
    "transformers-fp8": "transformers, its own online FP8",
    "transformers-bf16": "transformers, bf16",
    "safetensors": "safetensors, bf16",
    "instanttensor": "InstantTensor, reading bf16 alone",
    "fastsafetensors": "fastsafetensors, reading bf16 alone",
}
_SETTINGS = {"tmpfs": "files in memory", "ext4, cold": "a cold disk", "ext4, warm": "a disk, page cache warm"}
_COLD = """octavo reads files that are not cached ahead, while model code is imported, and its stream finds them in the
page cache; so here the whole call counts, imports and all."""
_ORDER = ("copy", "read", "read-direct", "ring", "ring-direct", *(f"octavo-{scheme}" for scheme in SCHEMES), *_PEERS)
_MODELS = {
    "qwen1.5-moe-a2.7b": "Qwen1.5-MoE-A2.7B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "llama3-8b": "Llama-3-8B",
    "huge-stack": "A layer with stacks of experts",
    "huge-stack-transposed": "A layer with stacks of experts, stored as [experts, in, out]",
    "opt-125m": "OPT-125m",
    "big-tensor": "with a matrix of 1.07 GB",
    "big-stack": "with a stack of 2.15 GB",
    "big-stack-transposed": "with a stack of 2.12 GB, stored [experts, in, out]",
}


def model_name(key: str) -> str:
    """The name under which people know a model of the benchmarks; with its layers, where it has fewer than there."""
    base, _, layers = key.rpartition("-")
    return f"{_MODELS[base]}, cut to {layers} layers" if base in _MODELS and layers.isdigit() else _MODELS.get(key, key)


def without_imports(row: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each load without those of its imports; of a ceiling, those of the part that repeats."""
    if "steady_s" in row:
        return dict(row["steady_s"])
    every = list(map(operator.sub, row["load_s"]["all"], row["imports_in_load_s"]["all"]))
    return {"median": statistics.median(every), "all": every}


def over_bytes(row: dict[str, Any]) -> int | None:
    """The peak beyond the end, as torch counts it or as the driver does, which also sees other allocators."""
    found = [row["over_bytes"]] if "over_bytes" in row else []
    if "device_peak_bytes" in row:
        found.append(row["device_peak_bytes"] - row["device_final_bytes"])
    return max(found, default=None)


def _way(way: str) -> str:
    if way.startswith("octavo-"):
        return f"octavo `{way.removeprefix('octavo-')}`"
    return _CEILINGS.get(way) or _PEERS.get(way, way)


def _on_gpu(result: Result) -> str:
    parts = []
    for model, found in result["models"].items():
        for setting, rows in found["settings"].items():
            sources, lines = Sources(result), []
            for way in sorted(rows.keys() & set(_ORDER), key=_ORDER.index):
                row = rows[way]
                if "load_s" not in row:
                    continue
                over, stream = over_bytes(row), row.get("report", {}).get("seconds", {}).get("stream")
                missed = [name for name, kept in row.get("promises", {}).items() if not kept]
                lines.append(
                    (
                        _way(way) + (f" ({', '.join(missed)} missed)" if missed else ""),
                        each(without_imports(row)),
                        "" if stream is None else seconds(stream),
                        each(row["load_s"]),
                        "" if way in _CEILINGS or over is None else mib(over),
                        sources.letter(row),
                    )
                )
            facts = found["checkpoint"]
            size = f"{facts['bytes'] / 1e9:.1f} GB in {facts['tensors']:,} tensors"
            head = ("", "seconds", "of which stream", "with imports", "MiB over", "run")
            parts += [f"### {model_name(model)}: {_SETTINGS.get(setting, setting)}", f"{size}."]
            parts += [_COLD if "cold" in setting else "", table(head, lines), sources.note()]
    return "\n\n".join(filter(None, parts))


def _streams(result: Result) -> str:
    parts = []
    for model, found in result["models"].items():
        sources = Sources(result)
        lines = [
            ("files into pinned slots, alone", seconds(found["read"]["s"]), "", sources.letter(found["read"])),
            ("and on to the device", seconds(found["ring"]["s"]), "", sources.letter(found["ring"])),
        ]
        for scheme in SCHEMES:
            for what, row in found.get(scheme, {}).items():
                launching = seconds(row["launching_s"]) if "launching_s" in row else ""
                lines.append((f"`{scheme}`: {what}", seconds(row["s"]), launching, sources.letter(row)))
        head = ("", "seconds", "launching", "run")
        parts.append(f"### {model_name(model)}\n\n{table(head, lines)}\n\n{sources.note()}")
    return "\n\n".join(parts)


#: of `coded_gpu`: kinds of sources, and shapes of experts
_CODED = {"blocks": "FP8 in blocks", "mxfp4": "MXFP4"}
_SHAPES = {"deepseek-v3": "DeepSeek-V3, 2048×7168", "qwen3-moe": "Qwen3-30B-A3B, 768×2048"}


def _coded(result: Result) -> str:
    lines = []
    for kind, named in _CODED.items():
        for shape, sides in _SHAPES.items():
            found = result[kind][shape]
            shares = [f"{row['gb_a_s']:.1f} ({row['over_ring']:.2f})" for way, row in found.items() if way != "ring"]
            schemes = [way for way in found if way != "ring"]
            lines.append((f"{named}, experts of {sides}", f"{found['ring']['gb_a_s']:.1f}", *shares))
    head = ("GB/s", "the ring", *(f"`{scheme}`" for scheme in schemes))
    return f"{table(head, lines)}\n\n{Sources(result).note()}"


def _on_cpu(result: Result) -> str:
    lines = []
    for name, found in result["checkpoints"].items():
        over = [mib(found["octavo"][scheme]["over_final_bytes"]) for scheme in SCHEMES]
        usual = found["from_pretrained_then_fp8_channel"]
        own = f"{mib(usual['over_final_bytes'])} (of which anonymous {mib(usual['anonymous_over_final_bytes'])})"
        lines.append((model_name(name), f"{found['checkpoint']['bytes'] / 1e9:.2f} GB", *over, own))
    head = ("model", "source", *(f"`{scheme}`" for scheme in SCHEMES), "bf16, then quantized")
    return f"{table(head, lines)}\n\n{Sources(result).note()}"


def make() -> str:
    """The page."""
    parts = [
        """Random weights in the shapes of the models that are named; each load is a process of its own. *Seconds* are
those of the call without what octavo and transformers alike spend on importing model code; *with imports* is the whole
call. *Stream* is the part that reads, copies and quantizes, of the fastest load. *MiB over* is the peak of the device's
memory over what the model takes in the end. Where a load was measured more than once, the median is given, and the
least and the largest value behind it. Rows that come from different runs (the letters) were measured on machines that
are said to be alike and are not; compare within a run.""",
        """Behind some rows stands what missed its aim: on an H100, *load* is to take at most 1.5 s for Qwen1.5-MoE
and 3.0 s for Qwen3-30B, imports included; *stream* at most 1.0 s for the first; *faster* asks for a quarter of the
time of transformers' own online FP8; *over* for at most 256 MiB over the model's own bytes; *reserved* for an allocator
that keeps at most 2 % more than it hands out.""",
        """## To a GPU

```sh
make bench B=load_gpu ARGS="--folder /dev/shm/octavo-bench"
```""",
    ]
    parts += [_on_gpu(result) for result in load("load_gpu")]
    parts += [
        *(pictures(result, "Seconds and memory of loads to a GPU") for result in load("load_gpu")),
        """## Where a stream's seconds go

```sh
make bench B=stream_gpu ARGS="--model qwen1.5-moe-a2.7b"
```

Each line is a whole pass over the checkpoint in a process that has done everything before: the stream with so many
threads and such a switch interval of the interpreter; *unread*, with slots that are never filled; *copied*, without
quantizing; *cut*, blocks cut in advance and nothing else. *Launching* is what the calling thread spent on copies and
kernels, its waits for the interpreter's lock included.""",
    ]
    parts += [_streams(result) for result in load("stream_gpu")]
    parts += [
        """### Of sources that are quantized already

```sh
make bench B=coded_gpu ARGS="--folder /dev/shm/octavo-bench"
```

Experts in FP8 blocks of 128×128 with float32 scales, or in MXFP4, in files in memory; parameters have their memory. GB
a second of what is stored, the best of some passes, and the share of the ring's, which only reads and copies.""",
    ]
    parts += [_coded(result) for result in load("coded_gpu")]
    parts += [
        """## Memory on a CPU

```sh
make bench B=load_memory
```

MiB over the final size, by the kernel's own mark of the process's peak (VmHWM). The promise is the staging budget of
256 MiB and 64 MiB more, whatever the size of a tensor. In the last column, mapped pages of the checkpoint count too,
which the kernel can drop; the anonymous part is what the process needs for itself.""",
    ]
    parts += [_on_cpu(result) for result in load("load_memory")]
    parts.append("![The FP8 curve rises under the line of the bf16 model](../images/load_memory.png)")
    return page("Loading", *parts)


def least_over(result: Result, checkpoint: str, scheme: str = "fp8_channel") -> tuple[int, int]:
    """MiB over the final size on a CPU: octavo's, and those of loading bf16 and then quantizing."""
    found = result["checkpoints"][checkpoint]
    usual = found["from_pretrained_then_fp8_channel"]["over_final_bytes"]
    return round(found["octavo"][scheme]["over_final_bytes"] / MIB), round(usual / MIB)
