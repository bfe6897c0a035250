"""How a transformers model is built from its checkpoint, where users want it otherwise; `octavo.load` explains each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """As the checkpoint's config says, unless something else is asked for."""

    dtype: torch.dtype | str | None = None  # of what is not quantized
    model_class: type[Any] | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    device_map: Any = None  # as transformers has it; None: all on one device
    max_memory: Mapping[int | str, int | str] | None = None


DEFAULTS = ModelOptions()
