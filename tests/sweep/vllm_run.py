"""The sweep of vLLM's registry: every architecture that transformers can build tiny, one after another.

    PYTHONPATH=src:tests python -m sweep.vllm_run --out vllm.jsonl

Importing vLLM takes longer than a case; so it is imported once, and each case runs in a fork of its own, within a time
limit. Results and resuming are those of `sweep.run`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from octavo.adapters.engine.names import SCHEMES

from .cases import Case
from .run import read, summary

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
}
_MOST_BYTES = 24 << 30


def vllm_cases() -> list[Case]:
    """Architectures that vLLM and transformers know by the same name."""
    import transformers
    from vllm.model_executor.models.registry import ModelRegistry

    found = []
    for name in sorted(ModelRegistry.models):
        config = getattr(getattr(transformers, name, None), "config_class", None)
        if config is not None:
            found.append(Case(config.model_type, name, ()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases to run, of names as llama/LlamaForCausalLM")
    parser.add_argument("--schemes", nargs="+", default=[*SCHEMES], choices=SCHEMES, help="all, one after another")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="for one case")
    parser.add_argument("--again", nargs="*", default=[], metavar="STATUS", help="run cases of this status again")
    parser.add_argument("--out", type=Path, default=Path("sweep-vllm.jsonl"), help="lines of JSON, added to")
    parser.add_argument("--write", type=Path, metavar="JSONL", help="all results, for benchmarks/results/sweep")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    import torch
    import transformers
    from vllm.model_executor.layers import fused_moe  # noqa: F401 (imported here once, and not in every fork)
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    from octavo.adapters.vllm import versions

    from .vllm_checks import check, in_fork

    torch.set_num_threads(1)
    load_general_plugins()
    get_quantization_config("compressed-tensors")
    gc.collect()
    gc.freeze()  # what is imported; vLLM collects garbage at each load
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions.inspect_in_this_process()
    cases = [case for case in vllm_cases() if re.search(asked.only, case.name)]
    names = {case.name for case in cases}
    kept = [found for found in read(asked.out) if found["status"] not in asked.again or found["case"] not in names]
    asked.out.write_text("".join(json.dumps(result) + "\n" for result in kept))
    done = {result["case"] for result in kept}
    with tempfile.TemporaryDirectory() as parent, open(asked.out, "a") as out:
        for case in cases:
            if case.name in done:
                continue
            folder = Path(tempfile.mkdtemp(dir=parent))
            began = time.monotonic()
            found = in_fork(lambda case=case, folder=folder: check(case, folder, asked.schemes), asked.limit)
            lost = {"case": case.name, "status": "wrong", "schemes": {}, "why": "its process ended"}
            if time.monotonic() - began >= asked.limit:
                lost |= {"status": "not built", "why": f"it took more than {asked.limit:.0f} s"}
            print(json.dumps(found or lost), file=out, flush=True)
    results = {result["case"]: result for result in read(asked.out)}
    found = [results[case.name] for case in cases]
    if asked.write:
        asked.write.write_text("".join(json.dumps(line) + "\n" for line in collected(found)))
    sys.exit(summary([{**result, "stages": _stages(result)} for result in found]))


def _stages(result: dict[str, Any]) -> dict[str, Any]:
    """The stages of all schemes."""
    return {f"{scheme} {n}": stage for scheme, each in result["schemes"].items() for n, stage in each["stages"].items()}


def collected(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page of the documentation is made from: versions, and results without what is said when all is well."""
    import transformers
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry

    cases = [{**result, "kind": _kind(result["case"].partition("/")[2])} for result in results]
    for case in cases:
        for stage in _stages(case).values():
            stage.pop("notes", None)
    versions = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    return [{**versions, "registered": len(ModelRegistry.models)}, *cases]


def _kind(architecture: str) -> str:
    """The part of vLLM's registry that an architecture is in."""
    from vllm.model_executor.models import registry

    for name, found in vars(registry).items():
        if name.endswith("_MODELS") and name != "_VLLM_MODELS" and isinstance(found, dict) and architecture in found:
            return name.strip("_").removesuffix("_MODELS").replace("_", " ").lower()
    return "other"


if __name__ == "__main__":
    main()
