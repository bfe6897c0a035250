"""The page of the architectures of vLLM: which of them octavo loads, and which read what it converts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .results import RESULTS, page, table

#: of a scheme
_STATUSES = ("right", "refused", "wrong")
#: of the stage of converting
_DECLINED = "declined"
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
its type, filled with random weights, and saved by transformers. Stock vLLM loads that. Then, for each scheme, vLLM does
with `--load-format octavo`; then `octavo convert` converts it, asking both readers, and stock vLLM loads the result.
*Right* means that every parameter of both is the one that stock vLLM has of the unquantized checkpoint, bit for bit
where it is kept and within the error of FP8 where not, and that the two agree in every bit wherever both are FP8 or
neither is. Parameters are compared as loaders leave them, before kernels have them laid out. *Not built* are those
that stock vLLM does not load from what transformers saves, on a CPU, with these versions: there is nothing to
compare with. *Not converted* are those that are right, and of which `octavo convert` says that vLLM can't load what it
writes: layers whose sides don't fit the kernels, which `--load-format octavo` leaves unquantized.""",
        *map(_version, sorted((RESULTS / "sweep").glob("vllm-*.jsonl"))),
    ]
    return page("Models in vLLM", *parts)


def _version(path: Path) -> str:
    found, *cases = map(json.loads, path.read_text().splitlines())
    schemes = list(dict.fromkeys(scheme for case in cases for scheme in case["schemes"]))
    rows: list[tuple[object, ...]] = []
    for kind in (*sorted({case["kind"] for case in cases}), "all"):
        mine = [case for case in cases if kind in ("all", case["kind"])]
        counts = Counter((scheme, each["status"]) for case in mine for scheme, each in case["schemes"].items())
        unbuilt = sum(case["status"] == "not built" for case in mine)
        numbers = []
        for scheme in schemes:
            numbers += [counts[scheme, status] for status in _STATUSES]
            numbers.append(sum(_converted(case, scheme) == _DECLINED for case in mine))
        rows.append((kind, len(mine), unbuilt, *numbers))
    unbuilt_cases = [case for case in cases if case["status"] == "not built"]
    odd = [
        (case, scheme, each) for case in cases for scheme, each in case["schemes"].items() if each["status"] != "right"
    ]
    columns = [column for scheme in schemes for column in (f"`{scheme}` right", *_STATUSES[1:], "not converted")]
    parts = [
        f"## vLLM {found['vllm']}",
        f"With transformers {found['transformers']}; {found['registered']} architectures are registered, of which "
        f"transformers has {len(cases)}.",
        table(("architectures", "tried", "not built", *columns), rows),
        *_online(cases),
    ]
    if odd:
        head = ("architecture", "scheme", "", "cause")
        parts += ["### Exceptions", table(head, [_exception(*each) for each in odd], 4)]
    if unbuilt_cases:
        whys = [(_name(case), _in_a_cell(case["why"])) for case in unbuilt_cases]
        parts += ["### Not built", table(("architecture", "why"), whys, 2)]
    return "\n\n".join(parts)


def _online(cases: list[dict[str, Any]]) -> list[str]:
    """How octavo compares with vLLM's own quantization while loading, where a sweep has tried it."""
    tried = [
        (case, scheme, each) for case in cases for scheme, each in case["schemes"].items() if "online" in each["stages"]
    ]
    if not tried:
        return []
    loads = [(case, scheme, each) for case, scheme, each in tried if each["stages"]["online"].get("loads")]
    behind = [
        f"{_name(case)} ({scheme})" for case, scheme, each in loads if each["stages"]["load"]["status"] != "right"
    ]
    which = f"octavo does not load {', '.join(behind)}" if behind else "octavo loads all of them right"
    return [
        f"vLLM's own online quantization (`fp8_per_channel`, `fp8_per_block`) loads {len(loads)} of {len(tried)} "
        f"architectures and schemes that were built. Of these, {which}."
    ]


def _converted(case: dict[str, Any], scheme: str) -> str:
    stage = case["schemes"].get(scheme, {}).get("stages", {}).get("convert", {})
    return str(stage.get("status", ""))


def _name(case: dict[str, Any]) -> str:
    return f"`{case['case'].partition('/')[2]}`"


def _exception(case: dict[str, Any], scheme: str, found: dict[str, Any]) -> tuple[str, str, str, str]:
    whys = [f"{n}: {stage['why']}" for n, stage in found["stages"].items() if n != "online" and "why" in stage]
    why = _CAUSES.get(_name(case).strip("`")) or _in_a_cell(case.get("why") or "; ".join(whys))
    return _name(case), f"`{scheme}`", found["status"], why


def _in_a_cell(text: str) -> str:
    """An error in one line that Markdown takes as it is."""
    text = re.sub(r"\s+", " ", re.sub(r"0x[0-9a-f]+", "0x...", text))
    text = text if len(text) <= 160 else text[:157].rstrip() + "..."
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)
