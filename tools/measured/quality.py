"""The page of how far answers are from the original's, by scheme and by peer."""

from __future__ import annotations

from typing import Any

from .results import Result, load, machine, page, table, versions

_TITLES = {"smollm2": "SmolLM2-135M", "whisper": "Whisper tiny.en"}


def make() -> str:
    """The page."""
    parts = [
        """```sh
make bench B=quality
```

How far a model's answers are from the original's when its weights are quantized: the divergence KL(original ||
quantized) in nats a token, with its standard error over windows of text, and the error of the weights in dB, where more
is better. All is computed in float32, so that only weights differ; in the rows that say so, the inputs of quantized
layers are 8-bit numbers as well, a scale a token. Peers quantize by their own functions. SmolLM2 (as `octavo demo`
prepares it) reads the reference of the Python language; Whisper is forced to the same text while it hears noise.""",
    ]
    results = load("quality")
    # which scheme is for whom follows from figures
    parts.append(table(("you have", "take", "because"), _WHOM, numbers_from=3) if results else "Not run yet.")
    for result in results:
        for name, found in result["models"].items():
            parts += [f"## {_TITLES.get(name, name)}, {found['tokens']:,} tokens", _table(found["ways"])]
        parts.append(_note(result))
    return page("Quality", *parts)


_WHOM = (
    ("a CPU", "`int8_channel`", "closest to the original, and its products read half the bytes of bf16"),
    ("a GPU with FP8 units, or an engine's plugin", "`fp8_channel`", "products run on these units"),
    ("kernels that want blocks", "`fp8_block`", "it is as good as a scale a row"),
    ("a reader of OCP MX", "`mxfp8`", "it is as good, and a thirtieth larger"),
)


def _table(ways: dict[str, Any]) -> str:
    head = ("weights", "KL, nats a token", "standard error", "SQNR, dB")
    lines = []
    for name, found in ways.items():
        if "error" in found:
            lines.append((name, "did not run", "", ""))
            continue
        error = "" if found["kl_se"] is None else f"{found['kl_se']:.5f}"
        lines.append((name, f"{found['kl']:.5f}", error, f"{found['sqnr_db']:.1f}"))
    return table(head, lines)


def _note(result: Result) -> str:
    facts = f"{machine(result['machine'])}. Versions: {versions([{**result['versions'], **result['peers']}])}"
    return f"<small>Machine: {facts}. Run: {result['date']} at commit `{result['commit']}`.</small>"
