"""The kernels that Triton compiles, where there is Triton, and a C compiler for it."""

from __future__ import annotations

import functools
from typing import Any

from ..machine import HAS_TRITON as HAS_TRITON


@functools.cache
def kernels() -> Any:
    """`octavo.running.kernels`, or None."""
    if not HAS_TRITON:
        return None
    from . import kernels as found

    return found
