"""What vLLM would make of a checkpoint in octavo's FP8, rank by rank, without weights: ``octavo plan --engine vllm``.

vLLM is asked in a process of its own (`forecasting`), for the reasons of `reader`; this module imports none of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ... import errors
from ...checkpoint.checkpoint import Checkpoint
from ...choices import AUTO
from ...errors import Lines, MissingExtraError, OctavoError, RecipeError
from ..engine.forecast import Forecast
from .options import Options
from .reader import ENVIRONMENT, PACKAGE

_LIMIT_S = 900.0


def plan_for_vllm(
    path: str | os.PathLike[str],
    scheme: str,
    *,
    ignore: Iterable[str] = (),
    format: str | None = None,
    staging_bytes: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    expert_parallel: bool = False,
    trust_remote_code: bool = False,
) -> Forecast:
    """Have vLLM's own loader run dry on every rank.

    Raises:
        MissingExtraError: vLLM is not installed.
        RecipeError: vLLM has no such scheme, or can't make the model; so it says why.
        OctavoError: what `Checkpoint.open` and a load in vLLM find wrong before weights are read.
    """
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "planning for vLLM")
    extra: dict[str, Any] = {"scheme": scheme, "ignore": list(ignore), "staging_bytes": staging_bytes}
    if format is not None:
        extra["format"] = format
    asked = Options.parse(extra)
    checkpoint = Checkpoint.open(path)
    if not checkpoint.config or Path(path).is_file():
        raise RecipeError(f"{checkpoint.path}: vLLM makes models of folders that have a config.json")
    notes: tuple[str, ...] = ()
    if asked.scheme == AUTO:
        settled, remark = asked.settled(checkpoint.decoded())
        extra["scheme"], notes = settled.scheme, (remark,) if remark else ()
    options = {
        "tensor_parallel_size": tensor_parallel,
        "pipeline_parallel_size": pipeline_parallel,
        "enable_expert_parallel": expert_parallel,
        "trust_remote_code": trust_remote_code,
    }
    found = _ask({"model": str(Path(checkpoint.folder).absolute()), "extra": extra, "options": options})
    if "error" in found:
        raise getattr(errors, found["error"], OctavoError)(Lines(found["text"]))
    made = Forecast.from_dict(found)
    return replace(made, notes=(*notes, *made.notes))


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PACKAGE)))
    try:
        ended = subprocess.run(
            [sys.executable, "-c", "from octavo.adapters.vllm.forecasting import main; main()"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise RecipeError(f"{job['model']}: vLLM did not answer within {_LIMIT_S:.0f} s") from None
    lines = ended.stdout.splitlines()
    if not lines:
        last = next((line.strip() for line in reversed(ended.stderr.splitlines()) if line.strip()), "no word")
        raise RecipeError(f"{job['model']}: vLLM ended with {ended.returncode}: {last}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
