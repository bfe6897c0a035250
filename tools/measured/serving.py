"""The page of vLLM: seconds until it serves, memory, tokens a second, and how the answers compare."""

from __future__ import annotations

from typing import Any

from .loading import model_name
from .results import MIB, Sources, gib, load, page, rate, seconds, table


def _way(key: str) -> str:
    """'octavo-fp8_channel tp1' -> what it is."""
    way, _, ranks = key.partition(" tp")
    name = {
        "octavo": "octavo `{}`",
        "converted": "vLLM, on what `octavo convert` wrote in `{}`",
    }.get(way.split("-")[0], "vLLM, bf16" if way == "bf16" else f"vLLM's own `{way}`")
    name = name.format(way.partition("-")[2])
    return name if ranks == "1" else f"{name}, {ranks} ranks"


def engines(result: Any, model: str) -> dict[str, dict[str, Any]]:
    """The engines that started, by their keys in the result."""
    return {key: row for key, row in result["models"][model].items() if " tp" in key and "load_s" in row}


def make() -> str:
    """The page."""
    parts = [
        """```sh
make bench B=vllm_gpu
```

Random weights in the shape of the model; each way is an engine in a process of its own. *Load* is vLLM's `load_model`
in the worker: making the model, filling it, bringing weights into the form of the kernels. *GiB over* is the peak of
that over what the model has in the end. Tokens a second are those of a prefill of 8,192 tokens, and of decoding one
sequence and 32, in CUDA graphs without torch.compile."""
    ]
    for result in load("vllm_gpu"):
        for model in result["models"]:
            sources, lines, compared = Sources(result), [], []
            rows = engines(result, model)
            for key, row in rows.items():
                decode = {count: rate(found["tokens_per_s"]) for count, found in row["decode"].items()}
                letter = sources.letter(row)
                lines.append(
                    (
                        _way(key),
                        seconds(row["load_s"]),
                        gib(row["over_bytes"]),
                        rate(row["prefill"]["tokens_per_s"]),
                        decode.get("1", ""),
                        decode.get("32", ""),
                        letter,
                    )
                )
                for other, found in row.get("against", {}).items():
                    if not key.startswith("octavo-") and not key.startswith("bf16"):
                        continue
                    compared.append(
                        (
                            _way(key),
                            _way(f"{other} tp1"),
                            "yes" if found["equal"] else "no",
                            f"{found['mean_difference']:.3f}",
                            f"{found['correlation']:.3f}",
                            letter,
                        )
                    )
            facts, converted = result["models"][model]["checkpoint"], result["models"][model]
            versions = {row["versions"]["vllm"] for row in rows.values()}
            parts.append(
                f"## {model_name(model)}\n\n{facts['bytes'] / 1e9:.1f} GB in {facts['tensors']:,} tensors, "
                f"vLLM {', '.join(sorted(versions))}."
            )
            head = ("", "load, s", "GiB over", "prefill", "decode, 1", "decode, 32", "run")
            parts += [table(head, lines), sources.note()]
            took = [
                f"`{key.removeprefix('convert-')}` in {seconds(row['seconds'])} s, with at most "
                f"{row['process']['peak_rss_bytes'] / MIB:,.0f} MiB"
                for key, row in converted.items()
                if key.startswith("convert-")
            ]
            if took:
                parts.append(
                    f"The conversion that the stock engine needs first, on the same machine: {'; '.join(took)}."
                )
            parts += [
                """### Answers

Logprobs of the prompts' own tokens and greedy tokens, against other engines of the same run. They are to be *equal* to
those of the converted checkpoint, which is what octavo promises; all others differ by as much as quantizing does.""",
                table(("", "against", "equal", "mean difference", "correlation", "run"), compared, numbers_from=3),
            ]
    return page("Serving with vLLM", *parts)
