"""SGLang that has not set one of octavo's hooks, as where a version has no such function any more.

    python -m helpers.sglang_hooks CHECKPOINT > answers

Takes one hook away after another, and makes a model's config and its loader, as servers do. Answers with a line of JSON
for each: the hook, how octavo was asked for, and the error. The last lines are of versions, and of what octavo says.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .sglang_loading import ENVIRONMENT, TESTS

WAYS: dict[str, dict[str, Any]] = {
    "load format": {"load_format": "octavo"},
    "quantization": {"quantization": "octavo_fp8_block"},
}
VERSIONS = ("0.5.9", "0.5.15", "0.5.23.post1", "0.5.24", "0.6.0rc1", "0.0.0.dev0", "unknown")


def without_hooks(checkpoint: Path) -> list[tuple[str, str, str | None]]:
    """(Hook, way of asking, error) of each; the hook is empty for none, and "version" for what octavo says of one."""
    finished = subprocess.run(
        [sys.executable, "-m", "helpers.sglang_hooks", str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
        cwd=TESTS,
    )
    found = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("[")]
    assert found, finished.stderr[-4000:]
    return [(hook, way, error) for hook, way, error in found]


def _start(checkpoint: str, options: dict[str, Any]) -> None:
    """What the processes of a server do until a model is made."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import get_model_loader
    from sglang.srt.server_args import ServerArgs

    from .sglang_loading import _publish

    server_args = ServerArgs(model_path=checkpoint, device="cpu", dtype="bfloat16", disable_cuda_graph=True, **options)
    _publish(server_args)
    model_config = ModelConfig.from_server_args(server_args)
    extra = server_args.model_loader_extra_config
    get_model_loader(LoadConfig(load_format=server_args.load_format, model_loader_extra_config=extra), model_config)


def _without(target: str, act: Callable[[], None]) -> str:
    """The error of ``act`` while what SGLang has hooked is what it was."""
    owner, name = target.rpartition(".")[::2]
    place = pkgutil.resolve_name(owner)
    hooked = vars(place)[name]
    original = getattr(hooked, "__func__", hooked).__wrapped__
    setattr(place, name, type(hooked)(original) if isinstance(hooked, staticmethod) else original)
    try:
        return _error(act)
    finally:
        setattr(place, name, hooked)


def _error(act: Callable[[], None]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _main() -> None:
    from . import sglang_stand_ins

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sglang_stand_ins.install()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang

    from octavo.adapters.sglang import plugin, versions

    os.environ["RANK"] = "0"
    for way, options in WAYS.items():

        def start(options: dict[str, Any] = options) -> None:
            _start(sys.argv[1], options)

        out.write(json.dumps(["", way, _error(start)]) + "\n")
        for target, *_ in plugin._hooks():
            out.write(json.dumps([target, way, _without(target, start)]) + "\n")
    for version in VERSIONS:
        sglang.__version__ = version
        said = versions.untried() if versions.is_supported() else versions.too_old()
        out.write(json.dumps(["version", version, said]) + "\n")
    out.flush()


if __name__ == "__main__":
    _main()
