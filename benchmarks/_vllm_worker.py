"""In every worker of vLLM: measures its loading, and answers about it. Named as ``worker_extension_cls``.

Importing this module is what begins to measure: it wraps the function that gives a model runner its loader.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
from typing import Any

import torch
import vllm.model_executor.model_loader as model_loader
import vllm.model_executor.model_loader.base_loader as base_loader
from _sums import memory, sum_of, synchronize

from octavo.machine import rss_bytes
from octavo.streaming.stream import Stream, Tally

FACTS: dict[str, Any] = {}
_LOG: list[str] = []


class _Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _LOG.append(record.getMessage())


logging.getLogger("vllm.octavo").addHandler(_Keep())


def _timed(name: str, work: Any) -> Any:
    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        synchronize()
        began = time.perf_counter()
        result = work(*args, **kwargs)
        synchronize()
        FACTS[name] = time.perf_counter() - began
        return result

    return run


def _measured(get_model_loader: Any) -> Any:
    """Loaders whose ``load_model`` and ``load_weights`` are timed, with the memory of the first."""

    def get(load_config: Any) -> Any:
        loader = get_model_loader(load_config)
        load_model = _timed("load_s", loader.load_model)

        def load(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            FACTS["before"] = memory()
            model = load_model(*args, **kwargs)
            FACTS["after"] = memory()
            FACTS["rss_bytes"] = rss_bytes()
            return model

        loader.load_model = load
        loader.load_weights = _timed("weights_s", loader.load_weights)
        return loader

    return get


def _counted(run: Any) -> Any:
    """`Stream.run`, which notes the bytes that were read, and those that the plan had forecast."""

    @functools.wraps(run)
    def counted(self: Stream, *args: Any, **kwargs: Any) -> Tally:
        before = self.tally.read_bytes
        tally: Tally = run(self, *args, **kwargs)
        FACTS["read_bytes"] = FACTS.get("read_bytes", 0) + tally.read_bytes - before
        FACTS["forecast_bytes"] = FACTS.get("forecast_bytes", 0) + self.plan.source_bytes
        return tally

    return counted


# the parts of ``load_model`` beside filling the model, by the names by which it calls them
base_loader.initialize_model = _timed("make_s", base_loader.initialize_model)
base_loader.process_weights_after_loading = _timed("process_s", base_loader.process_weights_after_loading)
Stream.run = _counted(Stream.run)  # type: ignore[method-assign]

# wherever it has been imported to; vLLM has several model runners, and what is imported later gets it from the first
_original, _wrapped = model_loader.get_model_loader, _measured(model_loader.get_model_loader)
for name in ("vllm.model_executor.model_loader", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
    if getattr(sys.modules.get(name), "get_model_loader", None) is _original:
        sys.modules[name].get_model_loader = _wrapped  # type: ignore[attr-defined]


class Meter:
    """What `vllm.LLM.collective_rpc` can ask of a worker."""

    def load_facts(self) -> dict[str, Any]:
        """Seconds and bytes of the load, and what octavo has logged."""
        return {**FACTS, "log": [line for line in _LOG if line.startswith("octavo: ")]}

    def parameter_sums(self) -> dict[str, str]:
        """Name -> dtype, shape and a sum of its bytes: the same for two models with the same bytes."""
        model = self.get_model()  # type: ignore[attr-defined]
        return {name: sum_of(tensor.detach()) for name, tensor in model.named_parameters()}
