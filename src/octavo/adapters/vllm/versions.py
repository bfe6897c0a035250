"""Differences between versions of vLLM, and names that are public in none of them. Nothing else knows the version."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn

OLDEST = (0, 24)
#: what vLLM calls the loader of a parameter of which it notes what comes
_DEFERRED = "online_process_loader"
#: the module that knows all loaders
LOADERS = "vllm.model_executor.model_loader"
#: of a layer that kernels are tried on
_SIDE = 1024
#: parameters of experts, which only scale activations, or (in 0.24) say in which order columns are that were sorted
_UNUSED = ("w13_input_global_scale", "w2_input_global_scale", "_g_idx", "_g_idx_sort_indices")
#: a module that every model in FP8 needs, whose kernels are known when it has been imported
CHECKPOINTS_IN_FP8 = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"


def is_supported() -> bool:
    """Return True if this vLLM is known to have what is used here. One without a version counts as new."""
    found = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    return found is None or (int(found[1]), int(found[2])) >= OLDEST


def replace_loader(load_format: str, change: Callable[[Any], Any]) -> None:
    """Put ``change(loader)`` in the place of the loader of a load format (None: of a new one).

    `register_model_loader` would warn about each one that exists.
    """
    from vllm.model_executor import model_loader

    known = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    known[load_format] = change(known.get(load_format))


def facts_of(vllm_config: Any, model_config: Any, prefix: str) -> str:
    """Words for all of vLLM that a survey depends on, but for its code."""
    from vllm.distributed import parallel_state

    from ..remembering import facts

    places = facts.places(parallel_state)
    settings = facts.of_settings(vllm.__version__, vllm_config, model_config, prefix, places)
    return f"{settings}\n{facts.of_environment(['VLLM_'])}"


def quantizes_cache(vllm_config: Any) -> bool:
    """Return True if the KV cache is in another format than the model's dtype, with scales."""
    from vllm.utils import torch_utils

    asked = getattr(torch_utils, "is_quantized_kv_cache", lambda dtype: dtype.startswith("fp8"))
    return bool(asked(str(vllm_config.cache_config.cache_dtype)))


def files_of(loader: Any, source: Any) -> list[Path]:
    """The .safetensors files of a `DefaultModelLoader.Source`; fetched, if it is a hub id."""
    prepared = loader._prepare_weights(
        source.model_or_path, source.subfolder, source.revision, False, source.allow_patterns_overrides
    )
    # (folder, files, ...): three values in 0.24, four since
    return sorted(Path(file) for file in prepared[1])


def remember_layers(vllm_config: Any) -> Callable[[], None]:
    """A function that forgets the layers which a model, made in between, has registered under their names."""
    compilation = vllm_config.compilation_config
    layers, moe_layers = dict(compilation.static_forward_context), list(compilation.static_all_moe_layers)

    def forget() -> None:
        compilation.static_forward_context.clear()
        compilation.static_forward_context.update(layers)
        compilation.static_all_moe_layers[:] = moe_layers

    return forget


def reloading(model: nn.Module) -> bool:
    """Return True while vLLM reloads this model layer by layer, its parameters in checkpoint format."""
    return any(waits(module) for module in model.modules())


def waits(layer: nn.Module) -> bool:
    """Return True while vLLM reloads this layer, and counts elements until it has all."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return bool(get_layerwise_info(layer).can_load())


def count(layer: nn.Module) -> int:
    """The elements that vLLM has counted for a layer that waits."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return int(get_layerwise_info(layer).load_numel)


def forget_what_came(layer: nn.Module) -> None:
    """Have vLLM drop what has come for a layer that waits; if nothing comes, it gets its old parameters back."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    info = get_layerwise_info(layer)
    info.loaded_weights.clear()
    info.load_numel = 0


def begin_anew(layer: nn.Module) -> None:
    """Have a layer that waited, and is about to be processed, wait again, as it did when the reload began."""
    from vllm.model_executor.model_loader.reload import layerwise

    if waits(layer):
        forget_what_came(layer)
        layerwise.restore_layer_on_meta(layer, layerwise.get_layerwise_info(layer))
        layerwise.initialize_online_processing(layer)


def check_kernel(config: Any, *parts: Any) -> None:
    """Raise what vLLM raises where it has no kernel here for what a config of compressed-tensors says of a layer.

    It is asked by having it make the weights of a layer whose sides fit all kernels. Nothing, where a version can't be
    asked so.

    Args:
        parts: quantization of weights, of inputs and of outputs, and the format.
    """
    scheme_of = getattr(config, "_get_scheme_from_parts", None)
    check = getattr(config, "_check_scheme_supported", None)
    if scheme_of is None or check is None:
        return
    try:
        inspect.signature(scheme_of).bind(*parts)
    except TypeError:
        return
    scheme = scheme_of(*parts)
    check(scheme.get_min_capability())
    create = getattr(scheme, "create_weights", None)
    about = {
        "layer": nn.Module(),
        "output_size": _SIDE,
        "input_size": _SIDE,
        "output_partition_sizes": [_SIDE],
        "input_size_per_partition": _SIDE,
        "params_dtype": torch.bfloat16,
        "weight_loader": lambda *_: None,
    }
    if create is None:
        return
    try:
        inspect.signature(create).bind(**about)
    except TypeError:
        return
    with torch.device("meta"):
        create(**about)


@contextlib.contextmanager
def loading_at_once(model: nn.Module) -> Iterator[None]:
    """While vLLM reloads a model: have loaders write, where otherwise it notes what comes until a layer is whole."""
    found: list[Any] = [parameter for parameter in (*model.parameters(), *model.buffers()) if _deferred(parameter)]
    deferring = [parameter.weight_loader for parameter in found]
    for parameter, loader in zip(found, deferring, strict=True):
        while loader.__name__ == _DEFERRED:
            loader = loader.__wrapped__
        parameter.weight_loader = loader
    try:
        yield
    finally:
        for parameter, loader in zip(found, deferring, strict=True):
            parameter.weight_loader = loader


def _deferred(parameter: Any) -> bool:
    return getattr(getattr(parameter, "weight_loader", None), "__name__", "") == _DEFERRED


def watch_reloads(check: Callable[[nn.Module], None]) -> None:
    """Have ``check(model)`` called before vLLM ends a reload; what it raises is raised when that is done."""
    from vllm.model_executor.model_loader.reload import layerwise

    original = layerwise.finalize_layerwise_processing
    if getattr(original, "check", None) is check:
        return  # since an earlier model

    @functools.wraps(original)
    def finalize(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            check(model)
        finally:
            original(model, *args, **kwargs)

    finalize.check = check  # type: ignore[attr-defined]
    layerwise.finalize_layerwise_processing = finalize


def exempt(model: nn.Module) -> set[str]:
    """Parameters for which no checkpoint needs to have a tensor: scales of the KV cache, and what experts don't use.

    They have scales of activations in NVFP4 also where weights alone are quantized, and an order of columns where none
    are sorted.
    """
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    from ..engine.coverage import parameters_of

    named = (name for name, _ in model.named_parameters())
    return {*parameters_of(BaseKVCacheMethod, model), *(name for name in named if name.endswith(_UNUSED))}


def replaced(model: nn.Module, model_config: Any) -> set[str]:
    """Parameters of a draft model for which vLLM takes those of its target, once both are loaded.

    They are an embedding and output heads; a draft that may have its own says so after it has been loaded.
    """
    if getattr(model_config, "runner_type", "") != "draft":
        return set()
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    found = {}
    if not getattr(model, "has_own_embed_tokens", False):
        found["model.embed_tokens"] = getattr(inner, "embed_tokens", None)
    if not getattr(model, "has_own_lm_head", False):
        found["lm_head"] = getattr(model, "lm_head", None)
        for number, layer in layers.items() if isinstance(layers, nn.ModuleDict) else enumerate(layers or ()):
            found[f"model.layers.{number}.shared_head.head"] = getattr(
                getattr(layer, "shared_head", None), "head", None
            )
    shared = ((path, module) for path, module in found.items() if isinstance(module, nn.Module))
    return {f"{path}.{name}" for path, module in shared for name, _ in module.named_parameters()}


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Without what vLLM warns of in this thread: a loader that runs dry is given what no checkpoint would hold."""
    thread = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.WARNING or record.name.startswith("vllm.octavo")

    handlers = logging.getLogger("vllm").handlers
    for handler in handlers:
        handler.addFilter(is_heard)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_heard)


def inspect_in_this_process() -> list[Exception]:
    """Have vLLM look at classes of models where it is; its way is to import them in another process, for seconds.

    Returns:
        What the classes raised that could not be imported, which vLLM only logs.
    """
    from vllm.model_executor.models import registry

    failed: list[Exception] = []

    def inspect(self: Any) -> Any:
        try:
            return registry._ModelInfo.from_model_cls(self.load_model_cls())
        except Exception as error:
            failed.append(error)
            raise

    registry._LazyRegisteredModel.inspect_model_cls = inspect
    return failed


@contextlib.contextmanager
def as_rank(rank: int, config: Any) -> Iterator[None]:
    """Meanwhile vLLM takes this process for one rank of those that ``config`` asks for. There are no others.

    What ranks would tell each other comes to nothing.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state as state

    new_group, new_coordinator = torch.distributed.new_group, state.init_model_parallel_group

    def alone(*args: Any, **options: Any) -> Any:
        without = {"use_device_communicator": False, "use_message_queue_broadcaster": False}
        return new_coordinator(*args, **{**options, **without})

    parallel = config.parallel_config
    changes = (
        (torch.distributed, "new_group", lambda ranks, **_: new_group(ranks, backend="fake")),
        (state, "init_model_parallel_group", alone),
        (state, "_node_count", lambda _: 1),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        torch.distributed.init_process_group("fake", rank=rank, world_size=parallel.world_size, store=FakeStore())
        parallel.rank = rank
        state.init_distributed_environment(parallel.world_size, rank, "fake://", 0, "fake")
        state.initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, backend="fake")
        yield
    finally:
        state.destroy_model_parallel()
        state.destroy_distributed_environment()
        for owner, name, value in before:
            setattr(owner, name, value)
