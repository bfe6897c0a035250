"""The options of vLLM's users. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..engine import options


class Options(options.Options):
    """``--model-loader-extra-config`` of vLLM."""

    engine = "vLLM"
    told: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "int8_channel": ("compressed-tensors-w8a8", "compressed-tensors"),
    }
