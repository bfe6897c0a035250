"""Models beside the target: drafts with checkpoints of their own, which stay as they are unless they are to be FP8.

A draft is FP8 where ``speculative_config`` says so by its own ``quantization``. All other options are the target's;
patterns of ``ignore`` hold for a draft where they match its tensors. Layers for multi-token prediction come from the
target's checkpoint, and are treated as it is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ...checkpoint.checkpoint import Checkpoint
from ...errors import Lines, OctavoError
from ...planning.recipe import matching
from ..engine.names import scheme_of_quantization
from . import versions
from .config import OctavoConfig
from .options import Options


def has_draft(vllm_config: VllmConfig) -> bool:
    """Return True if there is a draft with a checkpoint of its own."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return draft is not None and draft.model != speculative.target_model_config.model


def is_draft(vllm_config: VllmConfig, model_config: ModelConfig) -> bool:
    """Return True if this model is such a draft."""
    return has_draft(vllm_config) and model_config.model == vllm_config.speculative_config.draft_model_config.model


def is_asked_for(vllm_config: VllmConfig) -> bool:
    """Return True if any model is to be quantized by octavo."""
    speculative = vllm_config.speculative_config
    others = [getattr(speculative, f"{role}_model_config", None) for role in ("target", "draft")]
    return any(model and scheme_of_quantization(model.quantization) for model in (vllm_config.model_config, *others))


def replaced(vllm_config: VllmConfig, model: nn.Module, model_config: ModelConfig) -> set[str]:
    """Parameters for which vLLM takes those of the target; none, of a draft that is a model of its own."""
    if getattr(vllm_config.speculative_config, "method", "") == "draft_model":
        return set()
    return versions.replaced(model, model_config)


def without_config(vllm_config: VllmConfig) -> VllmConfig:
    """The same for a model to which the target's config of octavo's does not apply."""
    if not isinstance(vllm_config.quant_config, OctavoConfig):
        return vllm_config
    vllm_config = copy.copy(vllm_config)
    vllm_config.quant_config = None
    return vllm_config


def stock(load_config: Any) -> DefaultModelLoader:
    """vLLM's own loader, where the load format is octavo's."""
    load_config = copy.copy(load_config)
    load_config.load_format, load_config.model_loader_extra_config = "auto", {}
    return DefaultModelLoader(load_config)


def options_of(extra: Any, quantization: str) -> Options:
    """The target's options, for a draft with a scheme of its own."""
    given = {name: value for name, value in extra.items() if name != "scheme"} if isinstance(extra, dict) else extra
    scheme = scheme_of_quantization(quantization) or ""
    if isinstance(given, dict) and given.get("format") not in Options.formats_of(scheme):
        given.pop("format", None)  # it is about the target's scheme
    return Options.parse(given, quantization)


def fitting(options: Options, checkpoint: Checkpoint) -> Options:
    """The options without patterns that are about the target."""
    return dataclasses.replace(options, ignore=matching(options.ignore, checkpoint.tensors))


@contextlib.contextmanager
def naming(vllm_config: VllmConfig, model_config: ModelConfig) -> Iterator[None]:
    """Where there are two models, have errors say which one they are about."""
    try:
        yield
    except OctavoError as error:
        if not has_draft(vllm_config):
            raise
        role = "draft" if is_draft(vllm_config, model_config) else "target"
        path = "" if model_config.model in str(error) else f", {model_config.model}"
        first, *more = str(error).splitlines() or [""]
        raise type(error)(Lines.of(f"the {role}{path}: {first}", *more)) from error
