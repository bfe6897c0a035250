"""The two ways in which transformers' users load a model spread over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import octavo


def load(folder: Path, device_map: Any, scheme: str = "fp8_channel", **options: Any) -> Any:
    return octavo.load(folder, scheme, device_map=device_map, **options)


def from_pretrained(folder: Path, device_map: Any, scheme: str = "fp8_channel", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    config = octavo.OctavoConfig(scheme)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device_map, **options)


ROUTES = {"octavo.load": load, "from_pretrained": from_pretrained}
