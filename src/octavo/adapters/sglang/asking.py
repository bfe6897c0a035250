"""Which models octavo quantizes, and how: from SGLang's arguments to the config that it reads for a checkpoint.

The config of an FP8 checkpoint is put where SGLang reads that of a checkpoint on disk. It says by whom: the loader
knows its models by that, and takes no other. What is wrong is said as early as possible, in the process of the user.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.declared import Declared, read_declared
from ...checkpoint.quantized import KEYS
from ...choices import AUTO, DEFAULT_SCHEME
from ...conversion.formats import whole_config
from ...errors import RecipeError
from ...numerics import schemes
from ...numerics.schemes import FP8
from ...planning.plan import plan_checkpoint
from ...planning.recipe import matching
from ..engine.names import LOAD_FORMAT, PREFIX, SCHEMES, scheme_of_quantization
from .options import Options, meant

#: load formats that read safetensors, or that SGLang chooses by
_GIVES_WAY = (LOAD_FORMAT, "auto", "safetensors")
#: the key of a ``quantization_config`` that is octavo's
_MARK = "octavo"
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
        OctavoError: what is wrong with a checkpoint that is here, or its plan.
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
    server_args.model_loader_extra_config = json.dumps({**meant(server_args.model_loader_extra_config), **extra})
    server_args.quantization, server_args.load_format = None, LOAD_FORMAT
    options = Options.of(server_args.model_loader_extra_config)  # with the draft's scheme
    _try_plan(server_args.model_path, options)
    if (draft_options := options.for_draft()) and server_args.speculative_draft_model_path:
        _try_plan(server_args.speculative_draft_model_path, draft_options)


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

    Of one that is quantized already, nothing is left of what says so: SGLang is given what it stands for.

    Raises:
        RecipeError: it is quantized in a way that octavo can't decode.
    """
    options = _current.get()
    if options is None:
        return config
    config = copy.deepcopy(config)  # SGLang keeps the other one, for other models
    declared = _known(_without_declarations(config), model)
    options = _settled(options, model, declared)
    config.quantization_config = marked(whole_config(options.scheme, options.layout.name), options)
    return config


def _settled(options: Options, model: str, declared: Declared) -> Options:
    """The options with a scheme in the place of ``auto``: by headers, or by the config where these are not here yet.

    The loader has them, and decides by them.
    """
    if options.scheme != AUTO:
        return options
    if Path(model).is_dir():
        return options.settled(Checkpoint.open(model).decoded())[0]
    ways = [way.groups for way in declared.ways if way.kind == "float8"]
    known = [schemes.get(scheme) for scheme in SCHEMES]
    kept = (scheme.name for groups in ways for scheme in known if (scheme.groups, scheme.dtype) == (groups, FP8))
    return options.with_scheme(next(kept, DEFAULT_SCHEME))


def marked(config: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """A ``quantization_config`` that says that it is octavo's."""
    return {**config, _MARK: options.scheme}


def scheme_of(model_config: Any) -> str | None:
    """The scheme of a model of octavo's, by its config; None for any other."""
    found = getattr(model_config.hf_config, "quantization_config", None)
    return found.get(_MARK) if isinstance(found, Mapping) else None


def _without_declarations(config: Any) -> dict[str, Any]:
    """Take what says that weights are quantized out of a config and the parts of it; -> what that was, as in a file."""
    found: dict[str, Any] = {}
    for key, value in list(vars(config).items()):
        if key in KEYS:
            delattr(config, key)
            if value:
                found[key] = value if isinstance(value, Mapping) else value.to_dict()
        elif hasattr(value, "to_dict") and (declared := _without_declarations(value)):
            found[key] = declared
    return found


def _known(declared: Mapping[str, Any], model: str) -> Declared:
    """What is declared. Raise for what octavo can't decode; what tensors show, the loader finds."""
    found = read_declared(Path(model), declared, [])
    if found.unknown is not None:
        _refuse(model, found.unknown)
    return found


def _refuse(model: str, how: object) -> NoReturn:
    raise RecipeError(
        f"--load-format {LOAD_FORMAT} can't decode {model}, which is quantized already ({how}): leave it and "
        "--quantization out to serve the checkpoint so, or start from the bf16 checkpoint"
    )


def _try_plan(model: str, options: Options) -> None:
    """Raise what reading headers and planning raise, if the model is here. Each rank's loader does it again, later."""
    if not Path(model).is_dir():
        return
    checkpoint = Checkpoint.open(model).decoded()
    if (found := checkpoint.quantization) is not None:
        _refuse(model, found)
    options = options.settled(checkpoint)[0]
    known = matching(options.ignore, checkpoint.tensors)  # others may be about layers
    plan_checkpoint(checkpoint, dataclasses.replace(options, ignore=known).recipe, options.staging_bytes)
