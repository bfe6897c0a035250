"""The kernels that Triton compiles, where there is Triton, and a C compiler for it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

# Triton compiles a little C for each kernel, too
_COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
HAS_TRITON = importlib.util.find_spec("triton") is not None and _COMPILER is not None


@functools.cache
def kernels() -> Any:
    """`octavo.running.kernels`, or None."""
    if not HAS_TRITON:
        return None
    from . import kernels as found

    return found
