"""Streams sources that are quantized already by kernels, and on a CPU without: what both make, for random boxes.

Run, it does so with kernels that Triton interprets on a CPU, and prints what was done, and by how many launches.

    TRITON_INTERPRET=1 python -m helpers.decoding_by_kernel KIND [first seed] [seeds]
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import in_blocks, run_plan, same_bytes
from helpers.coded import coding_of, encoded, write_coded
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.codings import Decoding
from octavo.elements.symbolic import Symbolic
from octavo.errors import WeightError
from octavo.numerics import decoding
from octavo.planning import kinds
from octavo.planning.coded import decoded_there, lay_problems
from octavo.planning.placement import Target
from octavo.planning.plan import Plan, make_plan
from octavo.planning.recipe import Recipe
from octavo.streaming import coded_there

KINDS = {
    "blocks": [Decoding("float8", 128, 128), Decoding("float8", 7, 5)],
    "float8": [Decoding("float8", 1, None), Decoding("float8", None, None), Decoding("float8", 1, 32)],
    "int8": [Decoding("int8", 1, None), Decoding("int8", 1, 128), Decoding("int8_in_int32", 1, None)],
    "int4": [Decoding("int4_in_int32", 1, 32), Decoding("int4_in_int32", 1, None)],
    "mxfp4": [Decoding("e2m1", 1, 32)],
    "nvfp4": [Decoding("e2m1", 1, 16), Decoding("e2m1", 1, 16, divided=True)],
}
SCHEMES = ("fp8_channel", "fp8_block", "mxfp8", None, "fp8_tensor", "int8_channel")
launched = [0]


def prepare() -> None:
    """Let kernels be used on a CPU, and count them."""
    from octavo.numerics import decoding_kernel

    torch.cuda.current_device = lambda: -1  # as if the CPU were it
    decoding.kernel = lambda device: decoding_kernel
    run = decoding_kernel._run

    def counted(*arguments: Any) -> None:
        launched[0] += 1
        run(*arguments)

    decoding_kernel._run = counted


def case(kind: str, seed: int, device: str = "cpu") -> tuple[Any, Any, str] | None:
    """What becomes of a random box of a tensor in blocks there, and on a CPU, and what that is; None where nothing."""
    chance = random.Random(f"{kind} {seed}")
    how, scheme = KINDS[kind][seed % len(KINDS[kind])], SCHEMES[chance.choice((0, 0, 1, 1, 2, 2, 3, 3, 4, 5))]
    # of ints without zero points; scales of e4m3 come with a global one
    number = 3 * chance.randrange(1 << 16) if kind in ("int8", "int4") else chance.randrange(1 << 16)
    number = number * 2 + (kind == "nvfp4") if how.kind == "e2m1" else number
    rows, cols = chance.choice((1, 5, 40, 130)), chance.choice((16, 48, 96, 144, 160))
    stacked, transposed = chance.choice((None, None, 2, 3)), chance.random() < 0.2
    shape = (*([] if stacked is None else [stacked]), *((cols, rows) if transposed else (rows, cols)))
    coding = coding_of("w", shape, how, transposed)
    parts = encoded(coding, number)
    if how.kind == "float8" and number % 2:
        parts["codes"] = parts["codes"].float().to(torch.float8_e5m2)
    source = Symbolic.source("w", shape, torch.bfloat16)
    if chance.random() < 0.5:
        for axis, n in enumerate(source.shape):
            first = chance.randrange(n)
            source = source.narrow(axis, first, chance.randint(first + 1, n) - first)
    if chance.random() < 0.3:
        source = source.transpose(-1, -2)
    dtype = chance.choice((torch.bfloat16, torch.float16, torch.float32))
    target = Target("p", tuple(source.shape), dtype, kinds.EXPERTS, tuple(source.pieces))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, _ = write_coded(Path(folder), {"w": (coding, parts)}, shards=1 + seed % 2)
        if list(lay_problems("p", target.pieces, checkpoint.tensors)):
            return None
        plan = make_plan(checkpoint, [target], Recipe(scheme))
        (placement,) = plan.placements
        if not decoded_there(placement.pieces, dict(placement.codings)):
            return None
        cols = placement.shape[-1]
        if scheme is not None and chance.random() < 0.3 and cols > 130 and len(placement.parts) == 1:
            columns = (placement.rule.group_cols or 1, cols)
            plan = replace(plan, placements=(replace(placement, columns=columns),))
        what = f"{how}, {placement.scheme}, {shape}, {[p.size for p in placement.pieces]}, {dtype}, {placement.columns}"
        sizes = chance.choice((1 << 16, 1 << 13))
        there = replace(plan, placements=tuple(replace(each, device=device) for each in plan.placements))
        return taken(checkpoint, there, 2, sizes), taken(checkpoint, plan, 0, sizes), what


def check(mine: Any, theirs: Any, what: str) -> None:
    """Fail unless both are the same: bytes, or errors."""
    if isinstance(mine, str) or isinstance(theirs, str):
        assert mine == theirs, f"{what}: {mine} where a CPU says {theirs}"
        return
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        assert a is None or same_bytes(a.cpu(), b), f"{what}: other bytes"


def taken(checkpoint: Checkpoint, plan: Plan, lanes: int, block_bytes: int) -> Any:
    """What a stream makes, or the kind of error with which it ends."""
    try:
        return run_plan(checkpoint, plan, budget=in_blocks(plan, lanes=lanes, block_bytes=block_bytes))[0]["p"]
    except WeightError as error:
        return str(error).split(" of its rows")[0]


def main(kind: str, first: int = 0, count: int = 8) -> None:
    prepare()
    used = 0
    for seed in range(first, first + count):
        before = launched[0]
        found = case(kind, seed)
        if found is None:
            continue
        used += launched[0] > before
        print(launched[0] - before, found[2], flush=True)
        check(*found)
    assert used, "no kernel was tried"
    for how in KINDS[kind]:
        coding = coding_of("w", (8, 256), how)
        parts = encoded(coding, 3 if kind == "nvfp4" else 0)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, _ = write_coded(Path(folder), {"w": (coding, parts)})
            codings = [checkpoint.tensors["w"].coding]
            coded_there.rehearse(torch.device("cpu"), ["fp8_channel"], [each for each in codings if each is not None])
    print("done")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
