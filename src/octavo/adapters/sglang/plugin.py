"""What every process of SGLang is told of octavo: names, and hooks in SGLang's registry of these.

    ServerArgs        before its arguments are resolved: ``--quantization octavo_X`` becomes ``--load-format octavo``
    from_server_args  around the making of a model's config: says to the next one which models are octavo's
    get_config        around the reading of config.json: puts the FP8 checkpoint's ``quantization_config`` in
    LoadConfig        before it looks up its load format: ``octavo`` becomes a loader

A hook that it can't set, SGLang only logs. So each of them looks for the others, and so does the loader. Most processes
never load a model, or not by octavo: what stands behind the names is imported where it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...errors import RecipeError
from ..engine.names import LOAD_FORMAT, PREFIX
from . import offered, versions

# below SGLang's own loggers, so that its settings hold for ours
log = logging.getLogger("sglang.srt.octavo")


def register() -> None:
    """Make ``--load-format octavo`` and the quantizations known. May be called repeatedly."""
    if not versions.is_supported():
        log.warning("octavo: %s", versions.too_old())
        return
    versions.offer(LOAD_FORMAT, [PREFIX + scheme for scheme in offered.SCHEMES])
    for target, function, kind in _hooks():
        versions.hook(target, function, kind)


def check_hooks() -> None:
    """Raise a `RecipeError` that names the hooks that SGLang has not set: a model would stay in bf16, or not start."""
    missing = [target for target, function, _ in _hooks() if not versions.is_hooked(target, function)]
    if missing:
        raise RecipeError(
            f"SGLang has not set octavo's hook on {', '.join(missing)}; its log says why. Nothing can be quantized "
            "without: leave --load-format octavo out, or convert the checkpoint with `octavo convert`, and serve that."
        )


def _hooks() -> list[tuple[str, Callable[..., Any], str]]:
    configs = "sglang.srt.configs"
    return [
        (versions.server_args_target(), _read_arguments, "BEFORE"),
        (f"{configs}.model_config.ModelConfig.from_server_args", _make_model_config, "AROUND"),
        (f"{configs}.model_config.get_config", _read_config, "AROUND"),
        (f"{configs}.load_config.LoadConfig._verify_load_format", _look_up_loader, "BEFORE"),
    ]


def _read_arguments(server_args: Any, *_: Any, **__: Any) -> None:
    from . import asking

    if asking.is_asked_for(server_args) and not versions.is_resolved(server_args):
        check_hooks()
        asking.settle(server_args)


def _make_model_config(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    from . import asking

    if server_args.load_format != LOAD_FORMAT:
        return original(server_args, *args, **kwargs)
    check_hooks()
    with asking.about(server_args, *args, **kwargs):
        return original(server_args, *args, **kwargs)


def _read_config(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    from . import asking

    return asking.with_quantization(original(model, *args, **kwargs), model)


def _look_up_loader(load_config: Any, *_: Any, **__: Any) -> None:
    if load_config.load_format == LOAD_FORMAT:
        from . import loader

        load_config.load_format = loader.OctavoLoader
