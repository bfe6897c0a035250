"""The page of new weights in place, and of models that load themselves."""

from __future__ import annotations

from .loading import model_name
from .results import Sources, each, load, mib, page, seconds, table

_SOURCES = {
    "device": "on the device",
    "pinned": "in pinned memory",
    "iterator": "an iterator of pinned tensors",
    "pageable": "in ordinary memory",
}
_WAYS = {
    "plan": "recorded, then streamed",
    "direct": "straight into FP8",
    "layer": "layer by layer",
    "naive": "all in bf16, then quantized",
}


def make() -> str:
    """The page."""
    parts = [
        """## All weights of a model on a GPU

```sh
make bench B=update_gpu
```

`octavo.update` requantizes new bf16 weights into the FP8 storage of a model that was loaded before. *Limit* is what
reading the source once takes where it is on the device, and copying it there where it is not. The median is given, and
the least and the largest value behind it; *MiB over* is the peak over the model."""
    ]
    for result in load("update_gpu"):
        for model, schemes in result["models"].items():
            sources, lines = Sources(result), []
            for scheme, ways in schemes.items():
                for way, name in _SOURCES.items():
                    if way in ways:
                        row = ways[way]
                        took = each(row["update_s"])
                        over = mib(row["over_model_bytes"])
                        lines.append((f"`{scheme}`", name, took, seconds(row["limit_s"]), over, sources.letter(row)))
            facts = result.runs[sources.used[0]]["checkpoint"]
            head = ("scheme", "the source is", "seconds", "limit", "MiB over", "run")
            parts += [
                f"{model_name(model)}: {facts['bytes'] / 1e9:.1f} GB in {facts['tensors']:,} tensors.",
                table(head, lines, numbers_from=2),
                sources.note(),
            ]
    parts.append(
        """Launching is the limit where the source is on the device already: each tensor costs its share of Python and
of operations, whatever its size. From an iterator each copy is awaited, since the iterator may use the memory again.

## A model that loads itself

```sh
make bench B=layerwise_memory
```

A model in the style of serving engines (stacks of 60 experts, fused attention, weight loaders that narrow and copy),
loaded through `octavo.layerwise` in the ways that it offers. Memory is anonymous memory, sampled every 5 ms: what the
kernel can't drop."""
    )
    for result in load("layerwise_memory"):
        kept = []
        for way, name in _WAYS.items():
            row = result["ways"][way]
            bound = row["bound_over_final_bytes"]
            kept.append((name, mib(row["over_final_bytes"]), "" if bound is None else mib(bound)))
        row = result["ways"]["direct"]
        parts += [
            f"{mib(row['final_bytes'])} MiB in FP8, of which a layer's experts would be "
            f"{mib(row['largest_layer_bytes'])} MiB in bf16.",
            table(("way", "MiB over the FP8 model", "promised"), kept),
            Sources(result).note(),
            "![Memory while a model loads itself](../images/layerwise_memory.png)",
            """What the direct way takes over the model is malloc's: it does not grow with the number of layers, and
with `MALLOC_MMAP_THRESHOLD_=65536` most of it is gone. The picture's seconds were taken on a busy machine, and say
nothing.""",
        ]
    return page("Updating, and models that load themselves", *parts)
