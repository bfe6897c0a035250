"""The measured side of `vllm_gpu.py`: one engine of vLLM, loaded one way, answers prompts of random token ids."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from _engines import decode_rate, plugin_is_known, prefill_rate, random_ids, scheme_options

#: the group of entry points, and octavo's
PLUGINS, PLUGIN = "vllm.general_plugins", "octavo = octavo.adapters.vllm:register"

#: as the parent sets it, before anything of vLLM or torch is imported
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # multicast, which not every host has
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def engine_options(way: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What `vllm.LLM` is given for a way."""
    asked: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": "bfloat16",
        "seed": 0,
        "tensor_parallel_size": options["ranks"],
        "max_num_seqs": max(32, *options["batches"]),
        "max_model_len": options["length"],
        "max_num_batched_tokens": max(options["length"], options["prefill"][0] * options["prefill"][1]),
        "enable_prefix_caching": False,
        "worker_extension_cls": "_vllm_worker.Meter",
    }
    if options["device"] != "cpu":
        asked |= {
            "attention_backend": "TRITON_ATTN",
            "kv_cache_memory_bytes": options["cache_bytes"],
            "gpu_memory_utilization": 0.6,  # what must be free at the start; nothing is sized by it
        }
    if options["ranks"] > 1:
        asked["disable_custom_all_reduce"] = True
        asked["enable_expert_parallel"] = options["experts"]
    if options["graphs"]:
        sizes = sorted(options["batches"])
        asked["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
        }
    else:
        asked["enforce_eager"] = True
    kind, _, scheme = way.partition("-")
    if kind == "octavo":
        asked |= {"load_format": "octavo", "model_loader_extra_config": scheme_options(scheme)}
    elif kind.startswith("fp8_"):
        asked["quantization"] = kind
    return asked | options["engine"]


def prompts(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in random_ids(count, length, vocabulary)]


def measure(way: str, folder: Path, answers: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load, answer, time; tokens and logprobs are written to ``answers``."""
    began = time.perf_counter()
    if not plugin_is_known(PLUGINS):
        raise RuntimeError("vLLM does not find octavo's plugin")
    if options["ranks"] == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm
    from vllm import LLM

    imported = time.perf_counter()
    llm = LLM(**engine_options(way, folder, options))
    started = time.perf_counter()
    ranks = llm.collective_rpc("load_facts")
    config = json.loads((folder / "config.json").read_text())
    vocabulary = config["vocab_size"]
    found: dict[str, Any] = {
        "imports_s": imported - began,
        "start_s": started - imported,
        "ranks": ranks,
        "sums": llm.collective_rpc("parameter_sums") if options["sums"] else [],
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }
    answered = _answers(llm, prompts(*options["compare"], vocabulary), options["new"])
    answers.write_text(json.dumps({**answered, "sums": found.pop("sums")}))
    found["answers_s"] = time.perf_counter() - started
    if not options["speed"]:
        return found
    found["prefill"] = prefill_rate(
        functools.partial(_generate_s, llm, prompts(*options["prefill"], vocabulary)), math.prod(options["prefill"])
    )
    found["decode"] = {
        str(batch): decode_rate(
            functools.partial(_generate_s, llm, prompts(batch, options["prompt"], vocabulary)), batch, options["new"]
        )
        for batch in options["batches"]
    }
    return found


def _answers(llm: Any, asked: list[Any], new: int) -> dict[str, Any]:
    """Greedy tokens, and the logprob of each token of the prompts.

    One prompt at a time: which of several an engine takes into its first step is a matter of time, and products of
    other numbers of rows are rounded otherwise.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    outputs = [output for prompt in asked for output in llm.generate([prompt], params, use_tqdm=False)]
    logprobs = [
        [at[token].logprob for token, at in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) if at]
        for output in outputs
    ]
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "logprobs": logprobs}


def _generate_s(llm: Any, asked: list[Any], new: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert all(len(output.outputs[0].token_ids) == new for output in outputs)
    return seconds
