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
prepares it) reads the reference of the Python language; Whisper hears two minutes of speech, and is made to say what
the original says. Standard errors are of what is read alone: which of many equally good grids the weights happen to be
rounded to moves the divergence of FP8 by another twentieth, either way.""",
    ]
    results = load("quality")
    if not results:
        return page("Quality", *parts, "Not run yet.")
    parts += [
        "## Which scheme for whom",
        table(("you have", "take", "because"), _WHOM, numbers_from=3),
        _beside({name: found for result in results for name, found in result["models"].items()}),
        """One token on a GPU: the product of one row with a matrix of 14336×4096, times as fast as bf16's, launched
from Python and in a CUDA graph. One row on a CPU: with 4096×4096, on one thread. Both are of other runs, which
[Running](products.md) names. [Formats](../reference/formats.md#who-reads-it) has the details of the last column.""",
    ]
    for result in results:
        if any("redrawn" in way for found in result["models"].values() for way in found["ways"].values()):
            parts.append(_REDRAWN)
        for name, found in result["models"].items():
            parts += [f"## {_TITLES.get(name, name)}, {found['tokens']:,} tokens", _table(found["ways"])]
        parts.append(_note(result))
    return page("Quality", *parts)


# which scheme is for whom follows from figures
_REDRAWN = """Which of many equally good grids weights are rounded to is chance. So a scale a row is *redrawn*: each
matrix is multiplied by a random number between 1 and 2 before, and divided by it after. Listed is the mean over some
draws, and its standard error; float32 scales follow the factor, so that their grid stays the same."""
_WHOM = (
    ("a CPU", "`int8_channel`", "closest to the original, and its products read half the bytes of bf16"),
    ("a GPU with FP8 units, or an engine's plugin", "`fp8_channel`", "products run on these units"),
    ("kernels that want blocks", "`fp8_block`", "it is as good as a scale a row"),
    ("a reader of OCP MX", "`mxfp8`", "it is as good, and a thirtieth larger"),
    ("memory for four bits alone", "`nvfp4`", "a large model, compared first: any four bits damage a small one badly"),
)
#: scheme -> bits a weight, and which stock readers take a conversion
_SCHEMES = {
    "fp8_channel": ("8", "transformers, vLLM, SGLang"),
    "fp8_block": ("8", "transformers, vLLM, SGLang"),
    "fp8_tensor": ("8", "transformers, vLLM, SGLang"),
    "mxfp8": ("8.25", "transformers, dense models"),
    "int8_channel": ("8", "transformers; vLLM with 8-bit activations"),
    "nvfp4": ("4.5", "transformers, dense models"),
}


def _beside(models: dict[str, Any]) -> str:
    """Quality, speed, memory and readers of each scheme."""
    head = ("scheme", "bits a weight", *(f"KL, {_TITLES.get(name, name)}" for name in models),
            "one token on a GPU", "one row on a CPU", "read by")  # fmt: skip
    lines = []
    for scheme, (bits, readers) in _SCHEMES.items():
        found = [model["ways"].get(f"octavo {scheme}", {}) for model in models.values()]
        if any("kl" in each for each in found):
            kl = (f"{each['kl']:.4f}" if "kl" in each else "" for each in found)
            lines.append((f"`{scheme}`", bits, *kl, _on_gpu(scheme), _on_cpu(scheme), readers))
    return table(head, lines)


def _on_gpu(scheme: str) -> str:
    for result in load("matmul_gpu"):
        ways = result["results"]["Llama-3-8B up_proj"]["1"]
        if scheme in ways:
            return " / ".join(f"{ways['bf16'][key] / ways[scheme][key]:.2f}" for key in ("eager_us", "graph_us"))
    return ""


def _on_cpu(scheme: str) -> str:
    for result in load("linear_cpu"):
        ways = result["ms"]["1"]
        if f"octavo {scheme}" in ways:
            return f"{ways['bf16'] / ways[f'octavo {scheme}']:.2f}"
    return ""


def _table(ways: dict[str, Any]) -> str:
    head = ("weights", "KL, nats a token", "standard error", "SQNR, dB")
    head = (*head, "redrawn") if any("redrawn" in found for found in ways.values()) else head
    lines: list[tuple[str, ...]] = []
    for name, found in ways.items():
        if "error" in found:
            lines.append((name, "did not run", *[""] * (len(head) - 2)))
            continue
        redrawn = found.get("redrawn")
        mean = f"{redrawn['kl']:.5f} ± {redrawn['kl_sd'] / redrawn['draws'] ** 0.5:.5f}" if redrawn else ""
        line = (name, f"{found['kl']:.5f}", f"{found['kl_se']:.5f}", f"{found['sqnr_db']:.1f}", mean)
        lines.append(line[: len(head)])
    return table(head, lines)


def _note(result: Result) -> str:
    facts = f"{machine(result['machine'])}. Versions: {versions([{**result['versions'], **result['peers']}])}"
    return f"<small>Machine: {facts}. Run: {result['date']} at commit `{result['commit']}`.</small>"
