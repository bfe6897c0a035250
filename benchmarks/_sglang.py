"""The measured side of `sglang_gpu.py`: one engine of SGLang, loaded one way, answers prompts of random token ids.

In the processes of its ranks, `register` is a plugin of SGLang's beside octavo's, which measures the load.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import pkgutil
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _engines import decode_rate, plugin_is_known, prefill_rate, random_ids

#: the group of entry points; octavo's, and the measuring one
PLUGINS = "sglang.srt.plugins"
ENTRIES = ("octavo = octavo.adapters.sglang:register", "octavo_bench = _sglang:register")
#: what fills a model
_LOAD = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
#: where ranks write what they measured
_FACTS, _SUMS = "OCTAVO_BENCH_FACTS", "OCTAVO_BENCH_SUMS"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_DISABLE_CUDNN_CHECK": "1"}


# -- in every rank ----------------------------------------------------------------------------------------------------


def register() -> None:
    """Have SGLang's own hooks time what fills a model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_LOAD, _measured, HookType.AROUND)


class _Keep(logging.Handler):
    """What octavo logs of a load."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _measured(load_model: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    import torch
    from _sums import memory, sum_of, synchronize

    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    kept, log = _Keep(), logging.getLogger("sglang.srt.octavo")
    log.addHandler(kept)
    began = time.perf_counter()
    result = load_model(runner, *args, **kwargs)
    synchronize()
    facts: dict[str, Any] = {"load_s": time.perf_counter() - began, "after": memory(), "log": kept.lines}
    log.removeHandler(kept)
    if os.environ.get(_SUMS):
        facts["sums"] = {name: sum_of(tensor.detach()) for name, tensor in runner.model.named_parameters()}
    if folder := os.environ.get(_FACTS):
        Path(folder, f"{runner.tp_rank}.json").write_text(json.dumps(facts))
    return result


# -- the engine -------------------------------------------------------------------------------------------------------


def engine_options(way: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What `sglang.Engine` is given for a way."""
    asked: dict[str, Any] = {
        "model_path": str(folder),
        "dtype": "bfloat16",
        "device": options["device"],
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "attention_backend": "triton" if options["device"] == "cuda" else "torch_native",
        "disable_cuda_graph": not options["graphs"],
        "disable_radix_cache": True,
        "max_total_tokens": options["tokens"],
        "max_running_requests": max(options["batches"]),
        "context_length": options["length"],
        "tp_size": options["ranks"],
        "random_seed": 0,
        "log_level": "info",
    }
    if options["experts"]:
        asked["ep_size"] = options["ranks"]
    kind, _, scheme = way.partition("-")
    if kind == "octavo":
        asked |= {"load_format": "octavo", "model_loader_extra_config": json.dumps({"scheme": scheme})}
    elif kind == "fp8":
        asked["quantization"] = "fp8"
    return asked | options["engine"]


def measure(
    way: str, folder: Path, answers: Path, options: dict[str, Any], report: Callable[..., object]
) -> dict[str, Any]:
    """Load, answer, time; tokens and logprobs are written to ``answers``.

    Args:
        report: is given what is known by then before each step, and which one that is (``doing``), should it fail.
    """
    began = time.perf_counter()
    found: dict[str, Any] = {}

    def begin(step: str) -> None:
        found["doing"] = step
        report(**found)

    begin("imports")
    if not plugin_is_known(PLUGINS):
        raise RuntimeError("SGLang does not find octavo's plugin")
    facts = answers.with_suffix(".facts")
    shutil.rmtree(facts, ignore_errors=True)  # no figures of an earlier start
    facts.mkdir()
    os.environ[_FACTS] = str(facts)
    if options["sums"]:
        os.environ[_SUMS] = "1"
    import sglang
    import torch

    pkgutil.resolve_name(_LOAD)  # a hook on what is not there, SGLang would only log
    imported = time.perf_counter()
    begin("the start of the engine")
    engine = sglang.Engine(**engine_options(way, folder, options))
    try:
        started = time.perf_counter()
        ranks = [json.loads((facts / f"{rank}.json").read_text()) for rank in range(options["ranks"])]
        sums = [rank.pop("sums", None) for rank in ranks]
        found |= {
            "imports_s": imported - began,
            "start_s": started - imported,
            "ready_at_s": started,
            "ranks": ranks,
            "versions": {"sglang": sglang.__version__, "torch": torch.__version__},
        }
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        if options["answers"]:
            begin("answers")
            answered = _answers(engine, random_ids(*options["compare"], vocabulary), options["answer"])
            answers.write_text(json.dumps({**answered, "sums": sums}))
        if options["speed"]:
            begin("prefill")
            seconds_of = functools.partial(_seconds, engine, random_ids(*options["prefill"], vocabulary))
            found["prefill"] = prefill_rate(seconds_of, math.prod(options["prefill"]), options["repeats"])
            found["decode"] = {}
            for batch in options["batches"]:
                begin(f"decode of {batch}")
                seconds_of = functools.partial(_seconds, engine, random_ids(batch, options["prompt"], vocabulary))
                found["decode"][str(batch)] = decode_rate(seconds_of, batch, options["new"], options["repeats"])
        begin("the end of the engine")
    finally:
        engine.shutdown()
    return found


def _generate(engine: Any, ids: list[list[int]], new: int, **more: Any) -> list[Any]:
    params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    found: list[Any] = engine.generate(input_ids=ids, sampling_params=params, **more)
    assert all(len(each["output_ids"]) == new for each in found)
    return found


def _answers(engine: Any, ids: list[list[int]], new: int) -> dict[str, Any]:
    """Greedy tokens, and the logprob of each token of the prompts but the first.

    One prompt at a time: which of several an engine takes into its first step is a matter of time, and products of
    other numbers of rows are rounded otherwise.
    """
    outputs = [
        each for prompt in ids for each in _generate(engine, [prompt], new, return_logprob=True, logprob_start_len=0)
    ]
    return {
        "tokens": [output["output_ids"] for output in outputs],
        "logprobs": [[at[0] for at in output["meta_info"]["input_token_logprobs"][1:]] for output in outputs],
    }


def _seconds(engine: Any, ids: list[list[int]], new: int) -> float:
    began = time.perf_counter()
    _generate(engine, ids, new)
    return time.perf_counter() - began
