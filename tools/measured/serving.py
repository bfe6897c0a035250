"""The pages of engines: seconds until they serve, memory, tokens a second, and how the answers compare."""

from __future__ import annotations

from typing import Any

from .loading import model_name
from .results import MIB, Result, Sources, gib, load, page, rate, seconds, table

_VLLM = """```sh
make bench B=vllm_gpu
```

Random weights in the shape of the model; each way is an engine in a process of its own, or one for each GPU. *Load* is
vLLM's `load_model` in the worker: making the model, filling it, bringing weights into the form of the kernels. *GiB*
is what a GPU has in the end, and *over* the peak of the load over that. A *second start* finds the plan of the first
remembered. Tokens a second are those of a prefill of 8,192 tokens, and of decoding one sequence and 32, in CUDA graphs
without torch.compile."""

_SGLANG = """```sh
make bench B=sglang_gpu
```

Random weights in the shape of the model; each way is an engine with processes of its own. *Load* is the `load_model` of
SGLang's model runner: making the model, filling it, bringing weights into the form of the kernels. *GiB* is what a GPU
has in the end, and *over* the peak of the load over that. A *second start* finds the plan of the first remembered.
Tokens a second, where they were measured, are those of a prefill of 8,192 tokens, and of decoding one sequence and
32."""

_ANSWERS = """### Answers

Logprobs of the prompts' own tokens and greedy tokens, against other engines of the same run. They are to be *equal* to
those of the converted checkpoint, which is what octavo promises; all others differ by as much as quantizing does."""

_PARAMETERS = """*Parameters*: a sum of each parameter's bytes is equal on every rank, and answers are not. With several
ranks that engine was asked all prompts at once, and it may take others of them into a step each time, so that products
of other numbers of rows are rounded otherwise. That this is why was not shown: it was not asked one by one."""


def _way(key: str, engine: str) -> str:
    """'octavo-fp8_channel tp1' -> what it is."""
    way, _, ranks = key.partition(" tp")
    name = {
        "octavo": "octavo `{}`",
        "converted": f"{engine}, on what `octavo convert` wrote in `{{}}`",
    }.get(way.split("-")[0], f"{engine}, bf16" if way == "bf16" else f"{engine}'s own `{way}`")
    count, *more = ranks.split()
    parts = [name.format(way.partition("-")[2])]
    parts += [f"{count} ranks"] * (count != "1") + ["experts apart"] * ("ep" in more)
    return ", ".join([*parts, *["second start"] * ("again" in more)])


def engines(result: Result, model: str) -> dict[str, dict[str, Any]]:
    """The engines that started, by their keys in the result; those of as many ranks together."""
    found = {key: row for key, row in result["models"][model].items() if " tp" in key and "load_s" in row}
    return dict(sorted(found.items(), key=lambda item: item[0].partition(" tp")[2]))


def _same(found: dict[str, Any]) -> str:
    return "yes" if found["equal"] else "parameters" if found.get("equal_parameters") else "no"


def _loads(rows: dict[str, dict[str, Any]], sources: Sources, engine: str) -> str:
    """A line an engine; speeds only where some were measured."""
    speeds = any("prefill" in row for row in rows.values())
    lines = []
    for key, row in rows.items():
        name = f"{_way(key, engine)}{_remarks(row)}"
        found = [name, seconds(row["load_s"]), gib(row["final_bytes"]), gib(row["over_bytes"])]
        if speeds:
            decode = row.get("decode", {})
            measured = [row.get("prefill"), *(decode.get(count) for count in ("1", "32"))]
            found += [rate(each["tokens_per_s"]) if each else "" for each in measured]
        lines.append((*found, sources.letter(row)))
    head = ("", "load, s", "GiB", "over", *(("prefill", "decode, 1", "decode, 32") if speeds else ()), "run")
    return table(head, lines)


def _remarks(row: dict[str, Any]) -> str:
    """What else has to be known of a line."""
    eager = "prefill" in row and not row.get("graphs", True)
    return ", without CUDA graphs" * eager + ", failed afterwards" * ("error" in row)


def _answers(rows: dict[str, dict[str, Any]], sources: Sources, engine: str) -> list[str]:
    lines = []
    for key, row in rows.items():
        ranks = key.partition(" ")[2]
        for other, found in row.get("against", {}).items():
            twins = key.startswith("converted-") and other == key.partition(" ")[0].replace("converted", "octavo")
            if key.startswith(("octavo-", "bf16")) or twins:
                numbers = f"{found['mean_difference']:.3f}", f"{found['correlation']:.3f}"
                beside = other if " tp" in other else f"{other} {ranks}"
                lines.append((_way(key, engine), _way(beside, engine), _same(found), *numbers, sources.letter(row)))
    compared = table(("", "against", "equal", "mean difference", "correlation", "run"), lines, numbers_from=3)
    return [_ANSWERS, compared, *([_PARAMETERS] if any("parameters" in line for line in lines) else [])]


def _model(result: Result, model: str, engine: str) -> list[str]:
    rows, sources, all_of_it = engines(result, model), Sources(result), result["models"][model]
    facts, versions = all_of_it["checkpoint"], {row["versions"][engine.lower()] for row in rows.values()}
    parts = [
        f"## {model_name(model)}, {result.gpu}\n\n{facts['bytes'] / 1e9:.1f} GB in {facts['tensors']:,} tensors, "
        f"{engine} {', '.join(sorted(versions))}.",
        _loads(rows, sources, engine),
        sources.note(),
    ]
    took = [
        f"`{key.removeprefix('convert-')}` in {seconds(row['seconds'])} s, with at most "
        f"{row['process']['peak_rss_bytes'] / MIB:,.0f} MiB"
        for key, row in all_of_it.items()
        if key.startswith("convert-")
    ]
    if took:
        parts.append(f"The conversion that the stock engine needs first, on the same machine: {'; '.join(took)}.")
    return [*parts, *_answers(rows, sources, engine)]


def make(engine: str) -> str:
    """The page of an engine, "vLLM" or "SGLang"."""
    parts = [_VLLM if engine == "vLLM" else _SGLANG]
    for result in load(f"{engine.lower()}_gpu"):
        for model in result["models"]:
            parts += _model(result, model, engine)
    return page(f"Serving with {engine}", *parts)
