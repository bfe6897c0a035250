"""What vLLM's processes get of octavo before it is asked for: nothing but names."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from helpers.vllm_engine import ENVIRONMENT

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("vllm_loads"),
]

#: where vLLM keeps them
LOADERS = "vllm.model_executor.model_loader"


def fresh(code: str) -> Any:
    """What a process prints, as JSON, that has told vLLM of octavo as vLLM's front does, and goes on with ``code``."""
    begin = """
    import importlib, json, sys
    import vllm.engine.arg_utils
    from octavo.adapters.vllm import register

    before = set(sys.modules)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=200,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **ENVIRONMENT, "VLLM_PLUGINS": ""},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """One process for all, since vLLM alone takes seconds to import."""
    found: dict[str, Any] = fresh(f"""
    register()
    register()
    imported = sorted(set(sys.modules) - before)

    import pickle
    from {LOADERS} import _LOAD_FORMAT_TO_MODEL_LOADER as known
    from vllm.model_executor.layers.quantization import get_quantization_config

    def ours():
        return {{name: loader.__module__ for name, loader in known.items() if "octavo" in loader.__module__}}

    stock, told = dict(known), ours()
    made = get_quantization_config("octavo_fp8_block")()
    asked = ours()
    known.update(stock)
    pickle.loads(pickle.dumps(made))

    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum, current_platform

    kernels = [kernel.__name__ for kernel in linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]]
    watching = [type(finder).__name__ for finder in sys.meta_path]
    print(json.dumps(dict(imported=imported, told=told, asked=asked, sent=ours(), cpu=current_platform.is_cpu(),
                          kernels=kernels, watching=watching)))
    """)
    return found


def test_a_process_that_is_told_of_octavo_imports_names_alone(told: dict[str, Any]) -> None:
    assert set(told["imported"]) - {"octavo", "octavo._version", "octavo.adapters", "octavo.adapters.engine"} == {
        "octavo.adapters.engine.names",
        "octavo.adapters.vllm.plugin",
        "octavo.adapters.vllm.versions",
    }


def test_loaders_of_vllm_make_way_once_octavo_is_asked_for(told: dict[str, Any]) -> None:
    assert told["told"] == {"octavo": "octavo.adapters.vllm.plugin"}
    taken = dict.fromkeys(("auto", "hf", "safetensors"), "octavo.adapters.vllm.loader")
    assert told["asked"] == {**told["told"], **taken}
    assert told["sent"] == told["asked"]  # to a worker


def test_kernels_for_a_cpu_are_offered_once_a_model_is_in_fp8(told: dict[str, Any]) -> None:
    assert ("OctavoBlockLinear" in told["kernels"]) == told["cpu"]
    assert "_Watch" not in told["watching"]
