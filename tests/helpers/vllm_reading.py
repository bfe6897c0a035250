"""Conversions that vLLM is asked about, all by one reader: importing vLLM takes longer than all that is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.conversion.convert import convert_checkpoint
from octavo.conversion.proof import Reader
from octavo.planning.recipe import Recipe
from octavo.streaming.report import Report


def convert_for(
    reader: Reader,
    source: Path,
    scheme: str | Mapping[str, Any] = "fp8_channel",
    format: str = "compressed-tensors",
    ignore: Iterable[str] = (),
) -> tuple[Path, Report]:
    """Convert a folder into one beside it, proved by this reader alone."""
    target = source.with_name(f"{source.name}-for-vllm")
    recipe = Recipe.coerce(scheme, ignore)
    report = convert_checkpoint(
        source, target, recipe, format, 1 << 28, 1, "cpu", None, False, False, False, lambda: [reader]
    )
    return target, report
