"""What is swept: every model class that an auto class of transformers finds for a config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from transformers.models.auto import modeling_auto

#: the last resort of other auto classes: what else has a class is not told by it
BASE = "AutoModel"


@dataclass(frozen=True, order=True)
class Case:
    """A model class, and the type of the config that it is built from."""

    model_type: str
    model_class: str
    autos: tuple[str, ...]  # the auto classes that find it

    @property
    def name(self) -> str:
        return f"{self.model_type}/{self.model_class}"


def every_case() -> list[Case]:
    """All cases of the installed transformers, ordered by name."""
    found: dict[tuple[str, str], list[str]] = {}
    for auto, cls in sorted(vars(modeling_auto).items()):
        mapping = getattr(cls, "_model_mapping", None) if inspect.isclass(cls) else None
        if mapping is None or not auto.startswith("Auto"):
            continue
        for model_type, names in mapping._model_mapping.items():
            for name in names if isinstance(names, (tuple, list)) else (names,):
                found.setdefault((model_type, name), []).append(auto)
    return sorted(Case(*key, tuple(autos)) for key, autos in found.items())
