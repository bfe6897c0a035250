"""The page of what becomes FP8, for full-size shapes of many families."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .results import load, machine, page, table, versions

#: of the matrices; a family below it has its reasons named
_ENOUGH = 0.95
_WAYS = {"loaded": "loaded", "converted": "converted", "converted_for_vllm": "converted for vLLM"}


def make() -> str:
    """The page."""
    parts = [
        """```sh
make bench B=shares
```

The share of the bytes of all matrices (tensors with two and more dimensions, embeddings and output heads included, in
bf16) that becomes FP8 by default: when octavo loads a model; in what it converts, where all that transformers would
misread stays as it is; and in what it converts for vLLM alone (`--reader vllm`). No weight exists: models are built
without data from the sizes that are published, or that the class of the config has by default, and files of headers
alone are planned. Where a share is below 95 %, the largest parts of what is kept are named: embeddings, output heads,
routers and convolutions are kept on purpose."""
    ]
    for result in load("shares"):
        lines, low = [], []
        for name, found in result["families"].items():
            of = found["matrix_bytes"]
            ways = [found[way]["fp8_source_bytes"] / of for way in _WAYS]
            lines.append((name, f"{of / 1e9:,.1f}", *(f"{100 * share:.1f} %" for share in ways)))
            if min(ways) < _ENOUGH:
                low.append(f"- {name}: {_kept(found, of)}")
        facts = f"{machine(result['machine'])}. Versions: {versions([result['versions']])}"
        parts += [
            table(("model", "GB of matrices", *_WAYS.values()), lines),
            "## What is kept where less than 95 % becomes FP8",
            "\n".join(low),
            f"<small>Machine: {facts}. Run: {result['date']} at commit `{result['commit']}`.</small>",
        ]
    return page("What becomes FP8", *parts)


def _kept(found: dict[str, Any], of: int) -> str:
    """What is kept, by reason: a way is named where it keeps something else than loading does."""
    said: dict[str, str] = {}
    for way, title in _WAYS.items():
        kept = Counter[str]()
        for reason, nbytes in found[way]["kept_bytes"].items():
            kept[reason.split(", kept by default")[0]] += nbytes
        large = [f"{reason} {100 * n / of:.1f} %" for reason, n in kept.most_common(3) if n > 0.01 * of]
        text = "; ".join(large) or "nothing much"
        if text not in said.values():
            said[title] = text
    return ". ".join(text if title == "loaded" else f"{title.capitalize()}: {text}" for title, text in said.items())
