"""The page of the architectures of vLLM: which of them octavo loads, and which read what it converts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .results import RESULTS, page, table

_STATUSES = ("right", "refused", "not built", "wrong")
#: what no message tells
_UNFILLED = "octavo's loader refuses a model with a parameter that nothing fills; what is converted is read right"
_CAUSES: dict[str, str] = {
    "JambaForSequenceClassification": f"vLLM gives it an output head, which its checkpoints don't hold: {_UNFILLED}",
    "LagunaForCausalLM": f"vLLM gives its router a bias, which transformers does not save by default: {_UNFILLED}",
}


def make() -> str:
    """The page."""
    parts = [
        """```sh
make sweep-vllm
```

Every architecture that vLLM and transformers know by the same name is made small by shrinking the default config of
its type, filled with random weights, and saved by transformers. Stock vLLM loads that; then vLLM does with
`--load-format octavo`; then `octavo convert` converts it, asking both readers, and stock vLLM loads the result.
*Right* means that every parameter of both is the one that stock vLLM has of the unquantized checkpoint, bit for bit
where it is kept and within the error of FP8 where not, and that the two agree in every bit wherever both are FP8 or
neither is. Parameters are compared as loaders leave them, before kernels have them laid out. *Not built* are those
that stock vLLM does not load from what transformers saves, on a CPU, with these versions: there is nothing to
compare with.""",
        *map(_version, sorted((RESULTS / "sweep").glob("vllm-*.jsonl"))),
    ]
    return page("Models in vLLM", *parts)


def _version(path: Path) -> str:
    found, *cases = map(json.loads, path.read_text().splitlines())
    kinds = list(dict.fromkeys(case["kind"] for case in cases))
    rows: list[tuple[object, ...]] = []
    for kind in (*sorted(kinds), "all"):
        counts = Counter(case["status"] for case in cases if kind in ("all", case["kind"]))
        rows.append((kind, sum(counts.values()), *(counts[status] for status in _STATUSES)))
    odd = [case for case in cases if case["status"] not in ("right", "not built")]
    unbuilt = [case for case in cases if case["status"] == "not built"]
    parts = [
        f"## vLLM {found['vllm']}",
        f"With transformers {found['transformers']}; {found['registered']} architectures are registered, of which "
        f"transformers has {len(cases)}.",
        table(("architectures", "tried", *_STATUSES), rows),
    ]
    if odd:
        parts += ["### Exceptions", table(("architecture", "", "cause"), [_row(case) for case in odd], 3)]
    if unbuilt:
        parts += ["### Not built", table(("architecture", "why"), [_row(case)[::2] for case in unbuilt], 2)]
    return "\n\n".join(parts)


def _row(case: dict[str, Any]) -> tuple[str, str, str]:
    name = case["case"].partition("/")[2]
    whys = [f"{stage}: {found['why']}" for stage, found in case["stages"].items() if "why" in found]
    why = _CAUSES.get(name) or _in_a_cell(case.get("why") or "; ".join(whys))
    return f"`{name}`", case["status"], why


def _in_a_cell(text: str) -> str:
    """An error in one line that Markdown takes as it is."""
    text = re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+", "0x...", text))
    text = text if len(text) <= 160 else text[:157].rstrip() + "..."
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)
