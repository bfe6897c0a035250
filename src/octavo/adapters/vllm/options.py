"""The options of vLLM's users. Needs no vLLM."""

from __future__ import annotations

from ..engine import options


class Options(options.Options):
    """``--model-loader-extra-config`` of vLLM."""

    engine = "vLLM"
