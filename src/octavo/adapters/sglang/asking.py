"""Which models octavo quantizes, and how: from SGLang's arguments to the config that it reads for a checkpoint.

The config of an FP8 checkpoint is put where SGLang reads that of a checkpoint on disk. It says by whom: the loader
knows its models by that, and takes no other. What is wrong is said as early as possible, in the process of the user.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...conversion.formats import whole_config
from ...errors import RecipeError
from ...planning.plan import plan_checkpoint
from ...planning.recipe import matching
from ..engine.names import LOAD_FORMAT, PREFIX, scheme_of_quantization
from .options import Options

#: load formats that read safetensors, or that SGLang chooses by
_GIVES_WAY = (LOAD_FORMAT, "auto", "safetensors")
#: the key of a ``quantization_config`` that is octavo's
_MARK = "octavo"
#: other files by which checkpoints say that they are quantized
_SAID_BESIDE = ("hf_quant_config.json", "quant_model_description.json")
#: of the model whose config is being made
_current: ContextVar[Options | None] = ContextVar("octavo", default=None)


def is_asked_for(server_args: Any) -> bool:
    """Return True if any model is to be quantized by octavo."""
    given = (server_args.quantization, server_args.speculative_draft_model_quantization)
    formats = (server_args.load_format, server_args.speculative_draft_load_format)
    return LOAD_FORMAT in formats or any(map(scheme_of_quantization, given))


def settle(server_args: Any) -> None:
    """Have SGLang's arguments ask for octavo by the load format alone.

    Raises:
        RecipeError: they contradict each other.
    """
    quantization, load_format = server_args.quantization, server_args.load_format
    scheme = scheme_of_quantization(quantization)
    if scheme is None and load_format != LOAD_FORMAT:
        raise RecipeError(
            "octavo quantizes a draft only beside a target that it quantizes, too: ask for --load-format "
            f"{LOAD_FORMAT}, or leave the draft to SGLang"
        )
    if scheme is None and quantization is not None:
        raise RecipeError(
            f"--load-format {LOAD_FORMAT} quantizes by itself: leave --quantization {quantization} out, or use "
            f"--quantization {PREFIX}fp8_channel"
        )
    if load_format not in _GIVES_WAY:
        raise RecipeError(
            f"--quantization {quantization} quantizes what octavo reads, and --load-format {load_format} reads weights "
            f"itself; use --load-format {LOAD_FORMAT}, or leave it out"
        )
    options = Options.of(server_args.model_loader_extra_config, quantization)
    extra = {"scheme": options.scheme}
    if draft := scheme_of_quantization(server_args.speculative_draft_model_quantization):
        extra["draft"] = draft
        server_args.speculative_draft_model_quantization = None
    given = json.loads(server_args.model_loader_extra_config or "{}")
    server_args.model_loader_extra_config = json.dumps({**given, **extra})
    server_args.quantization, server_args.load_format = None, LOAD_FORMAT
    Options.of(server_args.model_loader_extra_config)  # with the draft's scheme


@contextlib.contextmanager
def about(
    server_args: Any, model_path: str | None = None, *_: Any, is_draft_model: bool = False, **__: Any
) -> Iterator[None]:
    """While the config of a model is made: the target, or a draft."""
    options: Options | None = Options.of(server_args.model_loader_extra_config)
    assert options is not None
    if is_draft_model and model_path not in (None, server_args.model_path):
        options = options.for_draft()
    token = _current.set(options)
    try:
        yield
    finally:
        _current.reset(token)


def with_quantization(config: Any, model: str) -> Any:
    """What config.json holds, as that of an FP8 checkpoint where the model is octavo's.

    Raises:
        RecipeError: it is quantized already.
        OctavoError: what is wrong with a checkpoint or its plan.
    """
    options = _current.get()
    if options is None:
        return config
    _refuse_quantized(config, model)
    if Path(model).is_dir():
        _try_plan(model, options)
    config = copy.deepcopy(config)  # SGLang keeps the other one, for other models
    config.quantization_config = marked(whole_config(options.scheme, options.format), options)
    return config


def marked(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A ``quantization_config`` that says that it is octavo's."""
    return {**config, _MARK: options.scheme}


def scheme_of(model_config: Any) -> str | None:
    """The scheme of a model of octavo's, by its config; None for any other."""
    found = getattr(model_config.hf_config, "quantization_config", None)
    return found.get(_MARK) if isinstance(found, Mapping) else None


def _refuse_quantized(config: Any, model: str) -> None:
    text = getattr(config, "text_config", None)
    found = next(
        (
            said
            for part in (config, text)
            for key in ("quantization_config", "compression_config")
            if (said := getattr(part, key, None))
        ),
        None,
    )
    beside = next((name for name in _SAID_BESIDE if (Path(model) / name).is_file()), None)
    if found is None and beside is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    how = f" ({method}, says its config.json)" if method else f" (says its {beside})" if beside else ""
    raise RecipeError(
        f"--load-format {LOAD_FORMAT} quantizes bf16 checkpoints, and {model} is quantized already{how}: leave it and "
        "--quantization out to serve the checkpoint so, or start from the bf16 checkpoint"
    )


@functools.lru_cache(maxsize=8)
def _try_plan(model: str, options: Options) -> None:
    """Raise what reading headers and planning raise. The loader of each rank does it again, elsewhere and later."""
    checkpoint = Checkpoint.open(model)
    recipe = options.recipe
    known = matching(options.ignore, checkpoint.tensors)  # others may be about layers
    plan_checkpoint(checkpoint, type(recipe)(recipe.scheme, ignore=known), options.staging_bytes)
