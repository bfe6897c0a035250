"""Which modules readers of compressed-tensors are told to leave alone: names, and patterns where there are many."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..planning import kinds
from ..planning.kinds import module_of
from ..planning.placement import Placement


def ignore_patterns(kept: Iterable[Placement], quantized: Iterable[Placement], others: Iterable[str]) -> list[str]:
    """Patterns of modules for which readers must not look for a scale.

    By its name in the checkpoint; matrices also below another prefix, since readers may build the module under one
    (``vision_tower`` as ``model.vision_tower``); and tied heads, which are in no file.
    """
    taken = {module_of(p.name) for p in quantized}
    kept = list(kept)
    series, single = _series({module_of(p.name) for p in kept} - taken, taken)
    names = sorted({*single, "lm_head"} - taken)
    matrices = {module_of(p.name) for p in kept if len(p.shape) == 2 and kinds.default_keep(p.name) is None}
    prefixed = [rf"re:.*\.{re.escape(name)}$" for name in sorted(matrices.intersection(single))]
    # of thousands of names, the last two components, which is as many as a head's have
    ends = {".".join(name.split(".")[-2:]) for name in taken}
    heads = [rf"re:(.*\.)?{head}$" for head in kinds.TIED_HEADS]
    free = [pattern for pattern in heads if not any(re.match(pattern[3:], end) for end in ends)]
    return [*names, *prefixed, *series, *free, *sorted({*others} - {*names})]


#: names that differ in numbers alone, from which on a pattern stands for them
_SERIES = 16


def _series(names: Collection[str], taken: Collection[str]) -> tuple[list[str], list[str]]:
    """Patterns that match many of these names, no ``taken`` one, and nothing but numbers more; and the names left.

    Readers compare every module with every entry: of ten thousand experts by name, they would take minutes.
    """
    found: list[str] = []
    left, whole, below = sorted(names), set[str](), set[str]()
    for fixed in range(3):  # layers, and experts in them
        groups: dict[str, list[str]] = {}
        for name in left:
            groups.setdefault(_template(name, fixed), []).append(name)
        if max(map(len, groups.values()), default=0) < _SERIES:
            continue  # of thousands that are taken, no template is needed
        used = {_template(name, fixed) for name in taken}
        if not whole:
            whole = used if not fixed else {_template(name) for name in taken}
            below = {each[i + 2 :] for each in whole for i in range(len(each)) if each.startswith(r"\.", i)}
        left = []
        for template, members in groups.items():
            if len(members) < _SERIES or template in used or _template(members[0]) in below:
                left += members
            else:
                found.append(rf"re:(.*\.)?{template}$")
    return found, left


def _template(name: str, fixed: int = 0) -> str:
    """A pattern for a name and all that differ from it in numbers alone, of which the first ``fixed`` are its own."""
    parts = []
    for part in name.split("."):
        fixed -= part.isdigit()
        parts.append(r"\d+" if part.isdigit() and fixed < 0 else re.escape(part))
    return r"\.".join(parts)
