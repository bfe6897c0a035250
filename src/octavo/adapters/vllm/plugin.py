"""What every process of vLLM is told of octavo: names. What stands behind them is imported where they are used.

Most processes of vLLM load no model, or not through octavo. They import nothing more of octavo, nothing of vLLM that
they would not have imported, and find vLLM as it is: what reads safetensors is replaced when a config of octavo's is
made, or comes from another process.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from typing import Any

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.platforms import current_platform

from ..engine.names import LOAD_FORMAT, PREFIX, SCHEMES
from . import versions

#: load formats of vLLM that read safetensors
READ_BY_VLLM = ("auto", "hf", "safetensors")


def register() -> None:
    """Make ``--load-format octavo`` and the quantizations known. May be called repeatedly."""
    for scheme in SCHEMES:
        name = PREFIX + scheme
        register_quantization_config(name)(type(name, (_Named,), {"__doc__": _Named.__doc__, "scheme": scheme}))
    _when_imported(versions.LOADERS, lambda: versions.replace_loader(LOAD_FORMAT, lambda _: _loader))
    if current_platform.is_cpu():
        _when_imported(versions.CHECKPOINTS_IN_FP8, _register_kernels)


def take_over() -> None:
    """Octavo is asked for: what reads safetensors makes way for it where the quantization is octavo's."""
    for load_format in READ_BY_VLLM:
        versions.replace_loader(load_format, _switching)


class _Named(QuantizationConfig):  # type: ignore[misc]
    """Stands in vLLM's registry for a config of octavo's, and makes one when it is called."""

    scheme = ""

    def __new__(cls) -> Any:
        return cls._config().asked()

    @classmethod
    def _config(cls) -> Any:
        from . import config

        return config.CONFIGS[cls.scheme]

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls._config().from_config(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> None:
        """Asked of every quantization that is known, whenever a checkpoint is quantized."""
        if user_quant == PREFIX + cls.scheme:
            cls._config().from_config(hf_quant_cfg)


def _loader(load_config: Any) -> Any:
    from . import loader

    return loader.OctavoLoader(load_config)


def _switching(made: Any) -> Any:
    from . import loader

    return loader.switching(made)


def _register_kernels() -> None:
    from . import cpu_kernels

    cpu_kernels.register()


def _when_imported(name: str, act: Callable[[], None]) -> None:
    """Call ``act`` once a module has been imported; now, if it has."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Watch(name, act))


class _Watch(MetaPathFinder):
    """Waits for one module. Where vLLM keeps a registry takes a second to import, which is not for us to do."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # by all others
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.act()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
