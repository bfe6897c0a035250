"""Global scales of NVFP4 that differ within a module, whose layers readers may join to one.

Each matrix has one by its largest magnitude, which is known when all of it has been read; so it is the files that are
asked, finished shards of an earlier run among them.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable

from ..planning.kinds import module_of
from ..planning.plan import Plan
from . import formats
from .folder import Folder
from .layout import ShardLayout

Divisors = dict[str, float]


def notes_on_global_scales(result: Folder, shards: Iterable[tuple[ShardLayout, Plan]]) -> list[str]:
    """A remark on modules whose layers differ, of which readers that join them would misread some."""
    modules: dict[str, Divisors] = {}
    for shard, plan in shards:
        for name, divisor in _divisors(result, shard, plan).items():
            above, _, layer = module_of(name).rpartition(".")
            modules.setdefault(above, {})[layer] = divisor
    differing = {above: layers for above, layers in modules.items() if len(set(layers.values())) > 1}
    if not differing:
        return []
    above, layers = next(iter(differing.items()))
    listed = ", ".join(f"{layer} 2^{-int(math.log2(divisor))}" for layer, divisor in layers.items())
    return [
        f"{len(differing):,} modules have layers whose global scales differ, as {above} has ({listed}): an engine that "
        "joins such layers, like q, k and v, or gate and up, takes one for all (vLLM: the smallest), and would misread "
        f"the others; where it does, keep them: ignore={[above]!r}"
    ]


def _divisors(result: Folder, shard: ShardLayout, plan: Plan) -> Divisors:
    """Weight -> what readers divide by: one by its global scale."""
    places = {p.name: shard.scales[p.name] for p in plan.quantized if formats.has_groups(p.scheme)}
    if not places:
        return {}
    with open(shard.name, "rb", buffering=0, opener=result.opener) as file:
        return {name: struct.unpack("<f", os.pread(file.fileno(), 4, at))[0] for name, at in places.items()}
