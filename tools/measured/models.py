"""The page of model types: what the sweep over all of transformers found."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from .results import Result, Sources, load, page, table

_STATUSES = ("right", "refused", "wrong", "not built")
#: what was said -> what it means; the first that fits
_CAUSES = (
    (r"requires the (\w+) library", r"it needs \1, which was not installed"),
    (r"took more than (\d+) s", r"it took more than \1 s"),
    (
        r"transformers itself can't dequantize it",
        "read right as it is. Asked to dequantize it, transformers itself raises: it can't for any compressed-tensors "
        "checkpoint of a model that takes a saved tensor apart",
    ),
    (
        r"source keys=.*one to many",
        "transformers itself raises for every compressed-tensors checkpoint of a model that takes a saved tensor apart",
    ),
    (
        r"can't load [\d,]+ FP8 tensors .*experts",
        "the report says that transformers can't load experts in FP8 which it stacks",
    ),
    (r"transformers can't read what it saved", "transformers can't read what it has saved of it"),
    (r"masked_spec_embed|level_embed|gamma_1|pos_bias_u|inited", "dtypes of parameters that `torch.Tensor(n)` makes"),
)


def make() -> str:
    """The page."""
    parts = [
        """```sh
make sweep JOBS=64
```

Every model class that an auto class of transformers finds, of every model type, built small with random weights, saved
in bf16 in three shards, and asked four things. Does `octavo.load` give every parameter the bits that transformers and
the scheme's definition give it? Does it answer as the same model with dequantized weights? Does `from_pretrained` with
an `OctavoConfig` make the same of it? Does stock transformers read `octavo.convert`'s result, dequantized and as it is,
to the same parameters?

*Built* are classes of which a small model could be made from the default config; *right* is one where all four hold;
*refused*, where octavo or its reader said clearly what it can't do; *wrong* is everything else. A class that several
auto classes find counts for each of them, and once in all."""
    ]
    for result in load("sweep"):
        parts += [_by_auto(result), Sources(result).note(), "## Exceptions", *_exceptions(result)]
    return page("Model types", *parts)


def _by_auto(result: Result) -> str:
    counts: dict[str, Counter[str]] = {}
    every: Counter[str] = Counter()
    for case in result["cases"].values():
        every[case["status"]] += 1
        for auto in case["autos"]:
            counts.setdefault(auto, Counter())[case["status"]] += 1
    head = ("auto class", "tried", "built", "right", "refused", "wrong")
    rows = [_row(f"`{auto}`", counts[auto]) for auto in sorted(counts)]
    tried = {name.split("/")[0] for name in result["cases"]}
    built = {name.split("/")[0] for name, case in result["cases"].items() if case["status"] != "not built"}
    types = f"{len(built)} of {len(tried)} model types were built, with {every.total()} classes."
    return "\n\n".join((types, table(head, [_row("all classes", every), *rows])))


def _row(name: str, counts: Counter[str]) -> tuple[object, ...]:
    tried = counts.total()
    return (name, tried, tried - counts["not built"], counts["right"], counts["refused"], counts["wrong"])


def _exceptions(result: Result) -> list[str]:
    """Every case that is not right, by what was found."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, case in result["cases"].items():
        for stage, why in case.get("why", {}).items() if case["status"] != "right" else ():
            found.setdefault((case["status"], stage, cause(why)), []).append(name)
    parts = []
    for status in _STATUSES[1:]:
        rows: list[tuple[Any, ...]] = [
            (stage, why, len(names), ", ".join(f"`{name}`" for name in names))
            for (of, stage, why), names in sorted(found.items(), key=lambda item: -len(item[1]))
            if of == status
        ]
        if rows:
            parts += [f"### {status.capitalize()}", table(("stage", "cause", "classes", "which"), rows, 4)]
    return parts


def cause(said: str) -> str:
    """What was said of a case, without what is the case's alone."""
    for pattern, meaning in _CAUSES:
        if match := re.search(pattern, said):
            return match.expand(meaning)
    plain = re.sub(r"^Shrink\([^)]*\): ", "", said)
    plain = re.sub(r"\{.*|\[.*", "…", plain)  # names of tensors
    plain = re.sub(r"\d[\d,.]*(?= (of|kept|parameters|tensors))", "some", plain)
    plain = re.sub(r"'\w+Config'", "its config", plain)
    return plain.replace("|", "\\|").replace("<", "&lt;")[:160]
