"""The options of SGLang's users. Needs no SGLang.

sglang serve MODEL --load-format octavo
sglang serve MODEL --load-format octavo --model-loader-extra-config '{"scheme": "fp8_block", "format": "fp8"}'
sglang serve MODEL --quantization octavo_fp8_block
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from ...choices import DEFAULT_FORMAT
from ...errors import RecipeError
from ..engine import options
from . import offered


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """``--model-loader-extra-config`` of SGLang.

    Its ``format`` of `fp8_block` may also be ``fp8``, for kernels that SGLang has for that alone.

    Args:
        draft: the scheme of a draft with a checkpoint of its own, which stays as it is otherwise.
    """

    engine = "SGLang"
    refused: ClassVar[Mapping[str, str]] = offered.REFUSED
    told: ClassVar[Mapping[str, tuple[str, ...]]] = {"fp8_block": (DEFAULT_FORMAT, "fp8")}

    draft: str | None = None

    def __post_init__(self) -> None:
        if self.draft is not None:
            self._check_scheme(self.draft)
            self.check_format(self.draft)

    def for_draft(self) -> Options | None:
        """The options for a draft with a checkpoint of its own, to which patterns don't apply; None if it stays."""
        return None if self.draft is None else dataclasses.replace(self, scheme=self.draft, ignore=())

    @classmethod
    def kinds(cls) -> dict[str, options.Kind]:
        scheme = (lambda value: value is None or isinstance(value, str), f"one of {', '.join(cls.offered())}")
        return {**super().kinds(), "draft": scheme}

    @classmethod
    def of(cls, extra: Any, quantization: str | None = None) -> Options:
        """As `parse`, of what SGLang holds: see `meant`."""
        return cls.parse(meant(extra), quantization)


def meant(extra: Any) -> Any:
    """``--model-loader-extra-config``, which SGLang holds as JSON, or as what it means; nothing said is no key."""
    if isinstance(extra, str):
        try:
            extra = json.loads(extra or "{}", object_pairs_hook=_once)
        except ValueError as error:
            raise RecipeError(
                f"--model-loader-extra-config is no JSON: {error}. Give the object itself, like "
                f'\'{{"scheme": "fp8_block"}}\', not a file\'s name; {extra[:100]!r} was given'
            ) from None
    return {} if extra is None else extra


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no key says two things."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise RecipeError(f"--model-loader-extra-config: {twice!r} is given twice")
    return found
