"""Stand-ins for packages that SGLang imports wherever it runs, and that have no builds for a CPU: they can be imported.

A package that is here is taken as it is.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

#: what SGLang of any version imports to load models, or for its whole engine
PACKAGES = ("torchvision", "cutlass", "cuda", "sgl_kernel", "tvm_ffi")


class _Anything:
    """Whatever a module is asked for at its top: a decorator, a base, a type, a constant."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        decorates = len(arguments) == 1 and callable(arguments[0]) and not options
        return arguments[0] if decorates else _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 (so that there are modules within it)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {}) if name[0].isupper() else _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = frozenset(packages)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(packages: Sequence[str] = PACKAGES) -> None:
    """Have ``packages`` importable from now on, unless they are anyway."""
    _let_transformers_look()
    sys.meta_path.append(_Finder(packages))  # the last that is asked
    # registers image processors, for which transformers wants the real torchvision
    configs: Any = types.ModuleType("sglang.srt.configs.utils")
    configs.register_image_processor = configs.register_processor = lambda *arguments, **options: None
    sys.modules[configs.__name__] = configs


def _let_transformers_look() -> None:
    """Have transformers find out, and remember, what is not here, before it seems to be."""
    from transformers.utils import import_utils

    for name in dir(import_utils):
        if name.startswith("is_") and name.endswith("_available"):
            with contextlib.suppress(Exception):  # some want to be told which
                getattr(import_utils, name)()
