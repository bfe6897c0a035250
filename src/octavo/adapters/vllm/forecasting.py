"""The process in which vLLM's loaders run dry, rank after rank (see `planning`): a job comes in, a forecast goes out.

Models are made on meta, by vLLM, as each rank would make its own; in memory only where one asks tensors for their
values while it is made.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from ...checkpoint.checkpoint import Checkpoint
from ...errors import OctavoError
from ...streaming.meter import collection_paused
from ..engine.forecast import Forecast, Rank, shared_notes
from ..engine.log import notes
from ..engine.names import LOAD_FORMAT
from ..engine.survey import Survey, error_text
from . import register, versions
from .loader import OctavoLoader
from .options import Options
from .processing import made_after_loading

#: of a checkpoint whose model has to be made in memory
_MOST_BYTES = 8 << 30


class _SeenError(Exception):
    """A survey is complete: nothing is to be loaded."""

    def __init__(self, model: nn.Module, found: Survey) -> None:
        super().__init__()
        self.model, self.found = model, found


class Forecaster(OctavoLoader):
    """Goes as far as the survey, and reads nothing."""

    @classmethod
    def look(cls, config: VllmConfig, device: str) -> tuple[nn.Module, Survey]:
        """The model, made on that device, and what its loader would do."""
        config.load_config.device = device
        try:
            cls(config.load_config).load_model(config, config.model_config)
        except _SeenError as seen:
            return seen.model, seen.found
        raise AssertionError("a model was loaded")

    def _warm_up(self, checkpoint: Checkpoint) -> None:
        """Nothing is streamed."""

    def _read_ahead(self) -> None:
        """No weight is read."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        raise _SeenError(model, self.survey(model, model_config))


def main() -> None:
    """Read a job from stdin; write a forecast, or an error, to stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is said does not mix with the answer
    out.write(json.dumps(answer(**json.loads(sys.stdin.read()))) + "\n")
    out.flush()


def answer(model: str, extra: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Forecast`; or the name of an error's class, and its text."""
    try:
        with collection_paused():
            return asdict(forecast(model, extra, options))
    except OctavoError as error:
        return {"error": type(error).__name__, "text": str(error)}
    except Exception as error:  # of vLLM's own
        return {"error": "RecipeError", "text": f"{model}: vLLM can't make this model: {error_text(error)}"}


def forecast(model: str, extra: dict[str, Any], options: dict[str, Any]) -> Forecast:
    """What vLLM would make of a folder.

    Args:
        extra: ``--model-loader-extra-config``.
        options: others of `vllm.EngineArgs`.
    """
    register()
    versions.inspect_in_this_process()
    asked, ranks, said, rank, world = Options.parse(extra), [], [], 0, 1
    while rank < world:
        arguments = EngineArgs(
            model=model,
            load_format=LOAD_FORMAT,
            model_loader_extra_config=extra,
            skip_tokenizer_init=True,
            enforce_eager=True,
            distributed_executor_backend="mp",  # else vLLM counts GPUs
            **options,
        )
        config = arguments.create_engine_config()
        world = config.parallel_config.world_size
        with set_current_vllm_config(config), versions.as_rank(rank, config):
            made, found = _look(config)
            derived = made_after_loading(made, config.model_config.dtype)
        device = config.device_config.device
        ranks.append(Rank.of(rank, made, found, "cpu" if str(device) == "cpu" else f"{device}:0", derived))
        said.append(notes(found.plan, asked.offered()))
        rank += 1
    return Forecast(f"vLLM {vllm.__version__}", model, asked.scheme, tuple(ranks), shared_notes(said))


def _look(config: VllmConfig) -> tuple[nn.Module, Survey]:
    forget = versions.remember_layers(config)
    try:
        return Forecaster.look(config, "meta")
    except OctavoError:
        raise
    except Exception as error:
        # what a tensor without data raises when it is asked for them
        if "meta" not in str(error).lower():
            raise
        nbytes = sum(path.stat().st_size for path in Path(config.model_config.model).glob("*.safetensors"))
        if nbytes > _MOST_BYTES:
            raise OctavoError(f"its model would have to be made in memory: {error_text(error)}") from error
    forget()
    return Forecaster.look(config, "cpu")
