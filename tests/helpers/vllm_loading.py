"""Models of vLLM without its engine: loaded, never run. Works where vLLM's compiled kernels don't.

    python -m helpers.vllm_loading < jobs > answers

Jobs are those of `helpers.vllm_engine`, with options ``rank`` (of ``tensor_parallel_size``) and ``kernels`` (whether
there are to be any, from then on), and steps ``["reload",
path]``, ``["update", path, [names, ...]]`` (the names of each call, and false to leave it without an end) and
``["draft"]``; an answer holds digests of parameters (and whether they are where they were at first, after each step),
or an error.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError

from .folders import tensors_of
from .vllm_engine import ENVIRONMENT, Answer, Job, addresses, digests
from .vllm_stand_ins import stand_in, without_kernels


def load(*jobs: Job, timeout: float = 300) -> list[Answer]:
    """Load one model after another, in one process."""
    finished = subprocess.run(
        [sys.executable, "-m", "helpers.vllm_loading"],
        input=json.dumps([{**asdict(job), "model": str(job.model.absolute())} for job in jobs]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parents[1],
    )
    lines = [line for line in finished.stdout.splitlines() if line.startswith('{"parameters"')]
    assert len(lines) == len(jobs), finished.stderr[-4000:]
    return [Answer(**json.loads(line), output=finished.stderr) for line in lines]


def _reload(model: Any, config: Any, first: dict[str, int], path: str) -> list[Any]:
    """What `reload_weights` of vLLM's model runner does; -> digests, and whether all parameters are where they were."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config.model_config.model = path
    with set_current_vllm_config(config):
        weights = get_model_loader(config.load_config).get_all_weights(config.model_config, model)
        initialize_layerwise_reload(model)
        model.load_weights(weights)
        finalize_layerwise_reload(model, config.model_config)
    return [digests(model), addresses(model) == first]


def _update(
    model: Any, config: Any, first: dict[str, int], path: str, calls: list[list[str]], ends: bool = True
) -> list[Any]:
    """What a weight transfer does; -> digests, whether parameters are where they were, and errors of calls and end.

    Names that the checkpoint lacks are those of fused tensors.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    tensors, errors = tensors_of(Path(path)), []

    def attempt(act: Callable[[], Any]) -> None:
        try:
            act()
        except OctavoError as error:
            errors.append(str(error))

    with set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        for names in calls:
            pairs = [(name, _tensor(tensors, name)) for name in names]
            attempt(functools.partial(model.load_weights, pairs))
        if not ends:
            return errors
        attempt(lambda: finalize_layerwise_reload(model, config.model_config))
    return [digests(model), addresses(model) == first, errors]


def _draft(model: Any, config: Any, first: dict[str, int]) -> dict[str, str]:
    """What a proposer does to draft by layers of the checkpoint itself; -> digests of that model."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(config):
        return digests(get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config))


def _tensor(tensors: dict[str, Any], name: str) -> Any:
    import torch

    if name in tensors:
        return tensors[name]
    for part, other in enumerate("qkv"):
        if (fused := name.replace(f"{other}_proj", "qkv_proj")) in tensors:
            return tensors[fused].chunk(3)[part]
    return torch.cat([tensors[name.replace("qkv_proj", f"{part}_proj")] for part in "qkv"])


_STEPS = {"draft": _draft, "reload": _reload, "update": _update}


def _model(model: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    defaults = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16"}
    config = EngineArgs(model=model, **{**defaults, **options}).create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


def _pretend(rank: int, ranks: int) -> None:
    """Be one of several ranks. Loading asks a group for its size, and for one's place in it, and nothing of others."""
    from vllm.distributed import parallel_state

    for group in (parallel_state._TP, parallel_state._EP):
        group.world_size, group.rank_in_group = ranks, rank


def _pack_convolutions() -> None:
    """From now on, do with convolutions' weights what vLLM does on processors with bf16: put them into other memory."""
    import torch
    from vllm import _custom_ops

    torch.cpu._is_avx512_bf16_supported = lambda: True
    _custom_ops.causal_conv1d_weight_pack = lambda weight: weight.flip(0).clone()


def _main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    stand_in()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
    for job in json.load(sys.stdin):
        answer: dict[str, Any] = {"parameters": [], "error": "", "results": []}
        options = job["options"]
        _pretend(options.pop("rank", 0), options.get("tensor_parallel_size", 1))
        if options.pop("packs", False):
            _pack_convolutions()
        if not options.pop("kernels", True):
            without_kernels()
        try:
            model, config = _model(job["model"], options)
            answer["parameters"] = [digests(model)]
            first = addresses(model)
            answer["results"] = [_STEPS[name](model, config, first, *arguments) for name, *arguments in job["steps"]]
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    _main()
