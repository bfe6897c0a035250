"""The page of what runs after loading: products on a GPU and a CPU, and a whole model's tokens a second."""

from __future__ import annotations

from typing import Any

from .loading import model_name
from .results import SCHEMES, Result, Sources, load, page, pictures, rate, table


def _times(result: Result, name: str, rows: dict[str, Any], key: str) -> str:
    lines, schemes = [], [name for name in next(iter(rows.values())) if name != "bf16"]
    for count, ways in rows.items():
        bf16 = ways["bf16"][key]
        faster = [f"{bf16 / ways[scheme][key]:.2f}" for scheme in schemes]
        lines.append((count, f"{bf16:,.0f}", *faster))
    head = ("rows", "bf16, µs", *(f"`{scheme}`" for scheme in schemes))
    return f"**{name}**\n\n{table(head, lines, numbers_from=0)}"


def _shape(result: Result, name: str) -> str:
    shape = result["shapes"][name]
    if len(shape) == 2:
        return f"{name}, {shape[0]}×{shape[1]}"
    return f"Experts of {name}: {shape[0]}, {shape[3]} a token"


def slowest(result: Result, key: str) -> tuple[float, str, str, str]:
    """(times as fast as bf16, shape, rows, scheme) of the product that loses most."""
    return min(
        (ways["bf16"][key] / ways[scheme][key], name, rows, scheme)
        for name, counts in result["results"].items()
        for rows, ways in counts.items()
        for scheme in SCHEMES
    )


def _called_from_python() -> list[str]:
    """The part on eager calls of whole models; nothing before it is measured."""
    parts = [
        """## A whole model, called from Python

```sh
make bench B=turns_gpu
```

Milliseconds of eager calls in bf16, and how many times as fast others are: the median of turns in which each way does
the same after the other in one process, and in brackets the quartiles. A decode is eight steps of as many sequences."""
    ]
    for result in load("turns_gpu"):
        for model, found in result["models"].items():
            sources = Sources(result)
            sources.letter(found["tasks"])
            parts += [f"**{model_name(model)}**", _turns(found["tasks"]), sources.note()]
    return parts if len(parts) > 1 else []


def _turns(tasks: dict[str, Any]) -> str:
    lines = []
    for task, ways in tasks.items():
        if isinstance(ways, dict):
            others = [row for way, row in ways.items() if way != "bf16"]
            cells = (f"{row['faster']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][1]:.2f})" for row in others)
            lines.append((task.replace("x", " × "), f"{ways['bf16']['ms']:,.1f}", *cells))
            named = [way.replace("octavo-", "octavo ") for way in ways if way != "bf16"]
    return table(("", "bf16, ms", *named), lines)


def make() -> str:
    """The page."""
    parts = [
        """## Products on a GPU

```sh
make bench B=matmul_gpu
```

How many times as fast as bf16, from one row of activations to 8192. Below 1 it is slower. mxfp8 has no product of its
own before Blackwell's units: its weights are widened.

""",
        *(pictures(result, "Products on a GPU, beside bf16") for result in load("matmul_gpu")),
        """### As a CUDA graph

What the GPU takes, without the host's part.""",
    ]
    graphs, eager = [], []
    for result in load("matmul_gpu"):
        for name, rows in result["results"].items():
            graphs.append(_times(result, _shape(result, name), rows, "graph_us"))
            eager.append(_times(result, _shape(result, name), rows, "eager_us"))
        graphs.append(Sources(result).note())
        eager.append(Sources(result).note())
    parts += graphs
    parts.append(
        """### Launched one by one from Python

The same products with the host's work in them. Quantizing the activations is one more launch, and where launching is
what takes the time, FP8 loses."""
    )
    parts += eager
    parts.append(
        """## A whole model on a GPU

```sh
make bench B=generate_gpu
```

Tokens a second: prefill of 8,192 tokens, and decoding one sequence as a CUDA graph. The cosine compares the logits
after the prefill with those of bf16; the weights are random, which is harder on it than trained ones."""
    )
    for result in load("generate_gpu"):
        for model, ways in result["models"].items():
            sources, lines = Sources(result), []
            for way, row in ways.items():
                if way == "checkpoint":
                    continue
                prefill, graph = row["prefill"], row["graph"]["1"]
                cosine = prefill["logits"].get("cosine")
                lines.append(
                    (
                        way.replace("octavo-", "octavo "),
                        rate(prefill["1x8192"]["tokens_per_s"]),
                        rate(prefill["4x2048"]["tokens_per_s"]),
                        rate(graph["tokens_per_s"]),
                        "" if cosine is None else f"{cosine:.3f}",
                        sources.letter(row),
                    )
                )
            head = ("", "prefill, 1 × 8192", "prefill, 4 × 2048", "decode, 1 sequence", "cosine", "run")
            parts += [f"**{model_name(model)}**", table(head, lines), sources.note()]
    parts += _called_from_python()
    parts.append(
        """## A linear layer on a CPU

```sh
make bench B=linear_cpu
```

Milliseconds for one product, on one thread. FP8 saves memory here, not time: processors have no FP8 units, so weights
are widened first, and a few rows take several times as long as in bf16."""
    )
    for result in load("linear_cpu"):
        lines = [(count, *(f"{value:.1f}" for value in ways.values())) for count, ways in result["ms"].items()]
        names = [f"`{name}`" for name in next(iter(result["ms"].values()))]
        side = result["side"]
        parts += [
            f"**{side}×{side}**",
            table(("rows", *(name.replace("octavo ", "") for name in names)), lines, numbers_from=0),
            "`q.to(bf16)` is torch's own widening, `_scaled_mm` torch's product of FP8 with FP8.",
            Sources(result).note(),
        ]
    return page("Running", *parts)
