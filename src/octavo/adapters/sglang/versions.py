"""Differences between versions of SGLang, and names that are public in none of them. Nothing else knows the version."""

from __future__ import annotations

import contextlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sglang
import torch
from torch import nn

OLDEST = (0, 5, 15)
NEWEST = (0, 5, 23)  # that was tried


def _version() -> tuple[int, int, int] | None:
    """None if it can't be told, as of a checkout, which calls itself 0.0.0."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(sglang.__version__))
    version = (0, 0, 0) if found is None else (int(found[1]), int(found[2]), int(found[3]))
    return version if any(version) else None


def is_supported() -> bool:
    """Return True if this SGLang is known to have what is used here. One without a version counts as new."""
    return (_version() or NEWEST) >= OLDEST


def too_old() -> str:
    """A remark on a version that is not supported."""
    return (
        f"needs SGLang {'.'.join(map(str, OLDEST))} or later, and this is {sglang.__version__}: --load-format octavo "
        "is unknown. Convert the checkpoint with `octavo convert`, and serve that."
    )


def untried() -> str | None:
    """A remark on a version that was not tried."""
    version = _version()
    if version is not None and version <= NEWEST:
        return None
    tried = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    return (
        f"octavo was tried with SGLang {tried}, and this is {sglang.__version__}. Should it fail, convert the "
        "checkpoint with `octavo convert`, and serve that without octavo."
    )


def offer(load_format: str, quantizations: Iterable[str]) -> None:
    """Have the command line take these."""
    from sglang.srt import server_args

    if load_format not in server_args.LOAD_FORMAT_CHOICES:
        server_args.add_load_format_choices([load_format])
        server_args.add_quantization_method_choices([*quantizations])


def server_args_target() -> str:
    """The method of ``ServerArgs`` before which arguments are as the user gave them."""
    from sglang.srt.server_args import ServerArgs

    # before 0.5.2x, an object resolves its arguments when it is made
    method = "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"
    return f"sglang.srt.server_args.ServerArgs.{method}"


def is_resolved(server_args: Any) -> bool:
    """Return True where arguments have come from another process, which has resolved them."""
    return bool(getattr(server_args, "_resolution_finished", False))


def hook(target: str, function: Callable[..., Any], kind: str) -> None:
    """Have SGLang call ``function`` where it calls what ``target`` names."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if all(function is not known for _, known, _ in HookRegistry._hooks.get(target, ())):
        HookRegistry.register(target, function, HookType[kind])


def is_hooked(target: str, function: Callable[..., Any]) -> bool:
    """Return True if SGLang has put a hook where it was to be; where it can't, it only logs that."""
    try:
        found = pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return False
    while found is not None:
        held = (getattr(cell, "cell_contents", None) for cell in getattr(found, "__closure__", None) or ())
        if any(value is function for value in held):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def files_of(loader: Any, model_config: Any) -> list[Path]:
    """The .safetensors files of a model; fetched, if it is a hub id."""
    _, files, _ = loader._prepare_weights(model_config.model_path, model_config.revision, fall_back_to_pt=False)
    return sorted(map(Path, files))


def facts_of(model_config: Any, load_config: Any) -> str:
    """Words for all of SGLang that a survey depends on, but for its code."""
    from sglang.srt.distributed import parallel_state

    from ..remembering import facts

    # since 0.5.2x the former only raises
    module = "runtime_context" if importlib.util.find_spec("sglang.srt.runtime_context") else "server_args"
    name = "get_server_args" if module == "runtime_context" else "get_global_server_args"
    given = pkgutil.resolve_name(f"sglang.srt.{module}:{name}")()
    places = facts.places(parallel_state)
    settings = facts.of_settings(sglang.__version__, model_config, load_config, given, places)
    return f"{settings}\n{facts.of_environment(['SGLANG_', 'SGL_'])}"


def quantization_config(model_config: Any, load_config: Any) -> Any:
    """What SGLang makes of the ``quantization_config`` that it found beside the checkpoint."""
    from sglang.srt.model_loader import loader

    return loader._get_quantization_config(model_config, load_config)


def make(model_config: Any, load_config: Any, quant_config: Any) -> nn.Module:
    """A model without weights, on the device that is torch's default at the moment."""
    from sglang.srt.model_loader import loader

    model: nn.Module = loader._initialize_model(model_config, load_config, quant_config)
    return model


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While a model is made."""
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    with set_default_torch_dtype(dtype):
        yield


def process(model: Any, device: torch.device) -> None:
    """What SGLang does with a model that has its weights, for its kernels."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    separate = getattr(DefaultModelLoader, "postprocess_weights", None)
    if separate is not None:  # 0.5.15 has it in one function with loading
        separate(model, device)
        return
    with without(model, "load_weights"):
        DefaultModelLoader.load_weights_and_postprocess(model, iter(()), device)


@contextlib.contextmanager
def without(module: Any, method: str) -> Iterator[None]:
    """Meanwhile, calls of a method do nothing."""
    before = module.__dict__.get(method)
    module.__dict__[method] = lambda *_, **__: None
    try:
        yield
    finally:
        del module.__dict__[method]
        if before is not None:
            module.__dict__[method] = before


def exempt(model: nn.Module) -> set[str]:
    """Parameters for which no checkpoint needs to have a tensor: scales of the KV cache."""
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod

    from ..engine.coverage import parameters_of

    return parameters_of(BaseKVCacheMethod, model)


def is_draft(model_config: Any) -> bool:
    """Return True if a model drafts for another one."""
    return bool(getattr(model_config, "is_draft_model", False))


def replaced(model: Any, model_config: Any) -> set[str]:
    """Parameters of a draft for which SGLang takes those of its target, once both are loaded: embedding and head."""
    if not is_draft(model_config) or not hasattr(model, "get_embed_and_head"):
        return set()
    embedding, head = model.get_embed_and_head()
    both = hasattr(model, "set_embed_and_head") and getattr(model, "load_lm_head_from_target", True)
    given = [embedding, head] if both else [embedding] if hasattr(model, "set_embed") else []
    return {name for name, parameter in model.named_parameters() if any(parameter is each for each in given)}


def is_whole(model: nn.Module) -> bool:
    """Return True if this process has all layers of a model: with pipelines, others have some of them."""
    from sglang.srt.distributed.parallel_state import get_pp_group

    return int(get_pp_group().world_size) == 1


def processes(method: Any) -> bool:
    """Return True if a layer's method may make something else of weights that have been loaded."""
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

    name = "process_weights_after_loading"
    return getattr(type(method), name, None) not in (None, getattr(QuantizeMethodBase, name))


def updater() -> type:
    """The class whose methods give a running model new weights."""
    from sglang.srt.model_executor import model_runner

    if hasattr(model_runner.ModelRunner, "update_weights_from_disk"):  # until 0.5.2x
        return model_runner.ModelRunner  # type: ignore[no-any-return]
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater  # type: ignore[no-any-return]


def model_of(updater: Any) -> nn.Module:
    """The model of what `updater` has made."""
    model: nn.Module = updater.get_model() if hasattr(updater, "get_model") else updater.model
    return model


def scheduler_updater() -> Any:
    """The class of which a scheduler has one, to pass on what it is asked for."""
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    return SchedulerWeightUpdaterManager


def updates() -> tuple[str, ...]:
    """Its methods that bring new weights, or end a session that did."""
    ways = ("disk", "tensor", "distributed", "ipc")
    return (*(f"update_weights_from_{way}" for way in ways), "end_weight_update")


def last_of_update() -> tuple[str, ...]:
    """Those after which an update is complete, if its request says nothing else."""
    if hasattr(scheduler_updater(), "end_weight_update"):  # since 0.5.2x
        return ("end_weight_update", "update_weights_from_ipc")
    return ("update_weights_from_tensor", "update_weights_from_distributed", "update_weights_from_ipc")


def loses_weights(manager: Any, model: nn.Module) -> bool:
    """Return True if a `scheduler_updater` gives memory of a model's weights back without a copy of them."""
    if not manager.memory_saver_adapter.enabled:
        return False
    server_args, is_target = manager.tp_worker.server_args, model is manager.tp_worker.model_runner.model
    kept = server_args.enable_weights_cpu_backup
    return not (kept if is_target else kept or server_args.enable_draft_weights_cpu_backup)
