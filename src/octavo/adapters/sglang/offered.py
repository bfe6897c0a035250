"""Which schemes this SGLang is offered. It is looked at and not imported; every process of it asks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..engine import names

#: what SGLang multiplies weights in nvfp4 with, beside activations in bf16; 0.5.15 has none
_NVFP4 = "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a16_nvfp4.py"


def refused_by(sglang: Path | None) -> dict[str, str]:
    """Schemes that SGLang is not given -> why. ``sglang`` is its package."""
    if sglang is None or (sglang / _NVFP4).is_file():
        return names.REFUSED
    why = "this one reads no weights in nvfp4 beside activations in bf16, as 0.5.23 does"
    return {**names.REFUSED, "nvfp4": why}


def _package() -> Path | None:
    spec = importlib.util.find_spec("sglang")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


REFUSED = refused_by(_package())
SCHEMES = tuple(scheme for scheme in names.SCHEMES if scheme not in REFUSED)
