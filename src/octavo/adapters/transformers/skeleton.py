"""A transformers model without weights.

Its parameters are on meta, which knows shapes and dtypes and holds no memory. Its buffers are real, since no checkpoint
holds them. All else is as ``from_pretrained`` would set it up.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.quantized import KEYS as QUANTIZATION_KEYS
from ...errors import CheckpointError, RecipeError, boundary, passes
from ...text import told
from . import own_code
from .bounds import check_buffers, check_layers, most_calls
from .building import TooMany, unallocated
from .options import DEFAULTS, ModelOptions


def skeleton(checkpoint: Checkpoint, asked: ModelOptions = DEFAULTS) -> Any:
    """Build the model that a checkpoint's config.json describes, in eval mode.

    Raises:
        CheckpointError: there is no config, or transformers can't make a model of it.
        RecipeError: the dtype that was asked for is none that a model computes in.
    """
    folder, trusted = str(checkpoint.folder), asked.trust_remote_code
    if not checkpoint.config:
        raise CheckpointError(f"{folder}: no config.json (or an empty one), which would say what model this is")
    check_layers(checkpoint)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        if passes(error):
            raise
        refused = None if trusted else own_code.refusal(error, folder, "config.json")
        raise refused or CheckpointError(f"{folder}/config.json: transformers can't read it: {told(error)}") from error
    if checkpoint.source is not None:
        _forget_declaration(config)
    if not trusted and not asked.attn_implementation:
        own_code.refuse_kernels(config, folder)
    # a config takes values of any type
    with boundary(f"{folder}/config.json", CheckpointError, (TypeError, ValueError, AttributeError)):
        chosen = _dtype(asked.dtype, config, checkpoint)
        cls = asked.model_class or _model_class(config, trusted)
    options = {"attn_implementation": asked.attn_implementation} if asked.attn_implementation else {}
    try:
        with contextlib.nullcontext() if trusted else own_code.hidden(config):
            model = _build(cls, config, chosen, trusted, options, checkpoint)
    except TooMany:
        raise CheckpointError(
            f"{folder}/config.json: describes a model of many more parameters than the checkpoint's "
            f"{len(checkpoint.tensors):,} tensors could make"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # what a config and options lead to is transformers' to say
        if passes(error):
            raise
        refused = None if trusted else own_code.refusal(error, folder, "config.json")
        raise refused or CheckpointError(
            f"{folder}: transformers can't build {getattr(cls, '__name__', cls)} from this config.json "
            f"with {dict(dtype=chosen, **options)}: {told(error)}"
        ) from error
    model.config.name_or_path = folder
    if model.can_generate():
        try:
            with contextlib.suppress(OSError):
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:
            if passes(error):
                raise
            file = f"{folder}/generation_config.json"
            raise CheckpointError(f"{file}: transformers can't read it: {told(error)}") from error
    model.eval()
    return model


def _forget_declaration(config: Any) -> None:
    """Let a config, whose weights octavo decodes, be that of a model which is not quantized."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in QUANTIZATION_KEYS:
            if part is not None and hasattr(part, key):
                delattr(part, key)


def _dtype(dtype: torch.dtype | str | None, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that was asked for, or the config's, or that of the first weight in the checkpoint."""
    if dtype is not None and dtype != "auto":
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if named not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise RecipeError(f"dtype must be a torch dtype that a model can compute in, or its name, not {dtype}")
        return named
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found)
    if isinstance(found, torch.dtype):
        return found
    floats = (dtypes.TORCH[info.dtype_name] for info in checkpoint.tensors.values() if info.quantizable)
    return next(floats, None) or torch.float32


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that the config names; where it names none, the causal language model of its type."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        name = next((n for n in ("AutoModelForCausalLM", "AutoModel") if n in auto_map), "AutoModelForCausalLM")
        return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


def _build(
    cls: Any, config: Any, dtype: torch.dtype, trusted: bool, options: dict[str, Any], checkpoint: Checkpoint
) -> Any:
    """A model of a class, or of the one that an auto class finds: its parameters on meta, its buffers computed."""
    modules = [kind.__module__ for kind in (cls, type(config))]
    own = not all(module.startswith("transformers.") for module in modules) or (trusted and hasattr(config, "auto_map"))
    # a dtype that transformers is told becomes the default of all threads
    with unallocated(dtype, values=own, most=most_calls(checkpoint)):
        if hasattr(cls, "_model_mapping"):
            model = cls.from_config(config, trust_remote_code=trusted, dtype=None, **options)
        else:
            model = cls._from_config(config, dtype=None, **options)
    for part in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    _separate(model)
    check_buffers(model, checkpoint)
    compute_buffers(model)
    return model


def _separate(model: Any) -> None:
    """Give each parameter a tensor of its own on meta.

    Tied ones are to be tied when it is known which of them the checkpoint has. Modules that are shared stay so.
    """
    tied, seen = {name for names in model.all_tied_weights_keys.items() for name in names}, set()
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if not parameter.is_meta or (id(parameter) in seen and name in tied):
                empty = torch.empty_like(parameter, device="meta")
                parameter = module._parameters[leaf] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            seen.add(id(parameter))


def compute_buffers(model: Any, chosen: Iterable[nn.Module] | None = None) -> None:
    """Give buffers (rotary and position tables) memory and values: of all modules of a model, or of the chosen ones.

    That is in torch's default dtype, as in ``from_pretrained``: in the model's half precision, GPT-J's sines would be
    wrong by most of 1.
    """
    every = set(model.modules())
    modules = every if chosen is None else set(chosen)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[union-attr]  # it has nothing to be initialised
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    before = {} if chosen is None else {module: vars(module).get("_is_hf_initialized") for module in every}
    for module in every:
        module._is_hf_initialized = module not in modules
    # without its decorators: they replace functions of torch.nn.init, for all threads
    with torch.no_grad():
        inspect.unwrap(type(model).initialize_weights)(model)
    for module, flag in before.items():
        module._is_hf_initialized = flag
