"""How long does it take to plan for a model of thousands of tensors, and to cut the plan into what is read at once?

    python benchmarks/plan_cpu.py [--models qwen3-30b-a3b] [--schemes fp8_channel] [--repeats 5]

That is the work of one thread of the host, before the reading and beside it. The files have headers and the right
sizes, and no data: shapes are all that counts. Every repetition is a process of its own, without Python's garbage
collector, as a load is:

    first, again   planning for transformers' model, in a process that has planned nothing yet, and once more; opening
                   the checkpoint and making the skeleton are included, importing model code is not
    remembered     the same, when the plan is one that an earlier load has made
    conversion     planning for the checkpoint's own tensors
    chunks         that plan, cut for a CPU
    blocks         the plan for the model, cut for an accelerator, what lies regularly joined to boxes
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import common
import make_checkpoint
import torch
from _measure import ImportClock
from common import run_fresh, say, summary

import octavo
from octavo import schemes
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.planning.blocks import cut_blocks
from octavo.planning.budget import Budget

T = TypeVar("T")
#: nothing is allocated there, so it need not be present
ACCELERATOR = torch.device("cuda", 0)
THREADS = 16
SECONDS = ("first_s", "again_s", "remembered_s", "conversion_s", "chunks_s", "blocks_s")

CHILD = """
import plan_cpu
from pathlib import Path
result(**plan_cpu.measure(Path(sys.argv[1]), sys.argv[2]))
"""


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def measure(folder: Path, scheme: str) -> dict[str, Any]:
    """Seconds of each step, and numbers of what was planned and cut."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _measure(folder, scheme)
    finally:
        if was_enabled:
            gc.enable()


def _measure(folder: Path, scheme: str) -> dict[str, Any]:
    device = str(ACCELERATOR)
    os.environ["OCTAVO_CACHE"] = os.devnull
    with ImportClock() as imports:
        first_s, plan = timed(lambda: octavo.plan(folder, scheme, device, model=True))
    again_s, plan = timed(lambda: octavo.plan(folder, scheme, device, model=True))
    with tempfile.TemporaryDirectory() as plans:
        os.environ["OCTAVO_CACHE"] = plans
        kept = octavo.plan(folder, scheme, device, model=True)
        remembered_s, found = timed(lambda: octavo.plan(folder, scheme, device, model=True))
        os.environ["OCTAVO_CACHE"] = os.devnull
        assert found == kept == plan
        assert any(Path(plans).rglob("?" * 64))
    conversion_s, conversion = timed(lambda: octavo.plan(folder, scheme, model=False))
    chunks_s, read_bytes = timed(lambda: conversion.read_bytes)
    tensors = Checkpoint.open(folder).tensors
    budget = Budget.on_accelerator(ACCELERATOR, plan.staging_bytes, THREADS)
    blocks_s, blocks = timed(lambda: list(cut_blocks(plan.placements, tensors, budget.block_bytes)))
    return {
        "first_s": first_s - imports.seconds,
        "imports_s": imports.seconds,
        "again_s": again_s,
        "remembered_s": remembered_s,
        "conversion_s": conversion_s,
        "chunks_s": chunks_s,
        "blocks_s": blocks_s,
        "tensors": len(tensors),
        "parameters": len(plan.placements),
        "read_bytes": read_bytes,
        "blocks": len(blocks),
        "boxes": sum(len(block.bundles) for block in blocks),
    }


def condense(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the seconds of all repetitions; the numbers are alike."""
    numbers = {key: value for key, value in runs[0].items() if isinstance(value, int)}
    assert all(numbers == {key: run[key] for key in numbers} for run in runs)
    return {**{key: summary([round(run[key], 4) for run in runs]) for key in (*SECONDS, "imports_s")}, **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_arguments(parser, ["qwen1.5-moe-a2.7b", "qwen3-30b-a3b"], make_checkpoint.MODELS)
    parser.set_defaults(folder=common.FOLDER)
    parser.add_argument("--schemes", nargs="+", default=["fp8_channel", "fp8_block"], choices=list(schemes.SCHEMES))
    parser.add_argument("--repeats", type=int, default=5, help="processes (%(default)s)")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    models: dict[str, Any] = {}
    for model in args.models:
        folder = common.model_folder(args.folder, f"{model}-sparse", args.layers)
        facts = make_checkpoint.make(model, folder, args.layers, sparse=True)
        runs: dict[str, list[dict[str, Any]]] = {scheme: [] for scheme in args.schemes}
        for _ in range(args.repeats):
            for scheme in args.schemes:
                runs[scheme].append(run_fresh(CHILD, folder, scheme))
        models[model] = {"checkpoint": facts, "schemes": {scheme: condense(found) for scheme, found in runs.items()}}
        for scheme, found in models[model]["schemes"].items():
            told = ", ".join(f"{key.removesuffix('_s')} {found[key]['median']:.3f}" for key in SECONDS)
            say(f"{model} {scheme}: {facts['tensors']:,} tensors, {found['boxes']:,} boxes; seconds: {told}")
    common.save("plan_cpu", args.folder, {"models": models}, write=not args.no_save)


if __name__ == "__main__":
    main()
