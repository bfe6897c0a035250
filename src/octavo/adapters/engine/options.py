"""The options of an engine's users: ``--model-loader-extra-config`` and ``--quantization``. Needs no engine.

vllm serve MODEL --load-format octavo
vllm serve MODEL --load-format octavo --model-loader-extra-config '{"scheme": "fp8_block", "ignore": ["*.down_proj"]}'
vllm serve MODEL --quantization octavo_fp8_block
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

from ...checkpoint.checkpoint import Checkpoint
from ...choices import AUTO, DEFAULT_FORMAT, DEFAULT_STAGING_BYTES
from ...conversion import formats
from ...errors import RecipeError
from ...planning.coded import settled
from ...planning.recipe import Recipe
from .names import FORMATS, REFUSED, SCHEMES, scheme_of_quantization


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_patterns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(pattern, str) for pattern in value)


def _is_bool(value: Any) -> bool:
    return type(value) is bool


#: whether a value is of its kind, and what that is
Kind = tuple[Callable[[Any], bool], str]
_KINDS: dict[str, Kind] = {
    "scheme": (lambda value: isinstance(value, str), "the name of a scheme"),
    "format": (lambda value: value is None or isinstance(value, str), "the name of a format"),
    "ignore": (_are_patterns, "a list of patterns"),
    "staging_bytes": (_is_count, "a number of bytes"),
    "threads": (lambda value: value is None or _is_count(value), "a number, at least 1"),
    "strict": (_is_bool, "true or false"),
    "remember": (_is_bool, "true or false"),
}

Mine = TypeVar("Mine", bound="Options")


@dataclass(frozen=True)
class Options:
    """``--model-loader-extra-config``, checked; each engine has its own class.

    Args:
        scheme: ``fp8_channel``, ``fp8_block``, ``int8_channel`` or ``nvfp4``; ``auto`` (default) is ``fp8_channel``,
            and where the source is quantized already, the one that keeps its bytes.
        format: of the checkpoint that the engine is told of, as in `octavo convert`; default: the one that it has more
            kernels for.
        ignore: patterns of checkpoint tensors that stay as they are; see `octavo.Recipe`.
        staging_bytes: bound on memory beyond the model, on the host and on the device.
        threads: that read; default: one a core, at most 16.
        strict: refuse to start where the engine's loader can't take a tensor in FP8, which otherwise stays as it is.
        remember: use the plan of an earlier start of the same, and keep this one for later ones.
    """

    engine: ClassVar[str]  # what it is called
    refused: ClassVar[Mapping[str, str]] = REFUSED  # schemes that it is not given -> why
    told: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # scheme -> formats, where there are several or another

    scheme: str = AUTO
    format: str | None = None
    ignore: tuple[str, ...] = ()
    staging_bytes: int = DEFAULT_STAGING_BYTES
    threads: int | None = None
    strict: bool = False
    remember: bool = True

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.scheme, ignore=self.ignore)

    @property
    def layout(self) -> formats.Format:
        """The format of the checkpoint that the engine is told of."""
        return formats.get(self.format or self.formats_of(self.scheme)[0])

    def check_format(self, scheme: str) -> None:
        """Raise a `RecipeError` unless the engine can be told of a scheme in the format; of ``auto``, in any way."""
        if self.format is None:
            return
        layout = formats.get(self.format)  # which may be unknown
        if scheme not in (*layout.schemes, AUTO):
            raise RecipeError(
                f"--model-loader-extra-config: the format {self.format!r} has no {scheme}, only "
                f"{', '.join(layout.schemes)}; choose another scheme, or the format {DEFAULT_FORMAT!r}"
            )
        if scheme != AUTO and self.format not in self.formats_of(scheme):
            raise RecipeError(
                f"--model-loader-extra-config: the format {self.format!r} of {scheme} is not offered in "
                f"{self.engine}; use {' or '.join(map(repr, self.formats_of(scheme)))}"
            )

    @classmethod
    def formats_of(cls, scheme: str) -> tuple[str, ...]:
        """The formats in which the engine can be told of a scheme; the default first."""
        return cls.told.get(scheme, (FORMATS.get(scheme, DEFAULT_FORMAT),))

    def settled(self: Mine, checkpoint: Checkpoint) -> tuple[Mine, str | None]:
        """The options with a scheme in the place of ``auto``, and a remark where that is not the usual one."""
        recipe, remark = settled(self.recipe, checkpoint.tensors.values(), self.offered())
        assert recipe.scheme is not None
        return self.with_scheme(recipe.scheme), remark

    def with_scheme(self: Mine, scheme: str) -> Mine:
        """The options with a scheme in the place of ``auto``, which has to fit the format."""
        self.check_format(scheme)
        return replace(self, scheme=scheme)

    @classmethod
    def offered(cls) -> tuple[str, ...]:
        """The schemes that the engine runs."""
        return tuple(scheme for scheme in SCHEMES if scheme not in cls.refused)

    @classmethod
    def names(cls) -> list[str]:
        """The keys that are known."""
        return [field.name for field in fields(cls)]

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """What the value of each key has to be."""
        return _KINDS

    @classmethod
    def parse(cls: type[Mine], extra: Any, quantization: str | None = None) -> Mine:
        """Parse ``--model-loader-extra-config`` and ``--quantization`` together.

        Raises:
            RecipeError: an unknown key, a value of the wrong kind, two schemes, or one that the engine can't run.
        """
        given = dict(extra) if isinstance(extra, Mapping) else {} if extra is None else None
        if given is None:
            raise RecipeError(f"--model-loader-extra-config must be a JSON object, not {extra!r}")
        unknown = sorted(set(given) - set(cls.names()))
        if unknown:
            known = ", ".join(cls.names())
            raise RecipeError(f"--model-loader-extra-config: unknown key {unknown[0]!r}; known: {known}")
        for name, (fits, what) in cls.kinds().items():
            if name in given and not fits(given[name]):
                raise RecipeError(f"--model-loader-extra-config: {name} must be {what}, not {given[name]!r}")
        named = scheme_of_quantization(quantization)
        if named and given.get("scheme", AUTO) not in (named, AUTO):
            raise RecipeError(
                f"--quantization {quantization} and the scheme {given['scheme']!r} of --model-loader-extra-config "
                "contradict each other; give one of them"
            )
        if named:
            given["scheme"] = named
        if given.get("scheme", AUTO) != AUTO:
            cls._check_scheme(given["scheme"])
        options = cls(**{**given, "ignore": tuple(given.get("ignore", ()))})
        _ = options.recipe  # finds malformed patterns
        options.check_format(options.scheme)
        return options

    @classmethod
    def _check_scheme(cls, scheme: Any) -> None:
        """Raise a `RecipeError` that names an alternative unless the engine can run the scheme."""
        if scheme in cls.offered():
            return
        if scheme in cls.refused:
            instead = f"Use {' or '.join(cls.offered())}"
            raise RecipeError(f"the scheme {scheme} is not offered in {cls.engine}: {cls.refused[scheme]}. {instead}")
        raise RecipeError(f"unknown scheme {scheme!r}; offered in {cls.engine}: {', '.join(cls.offered())}")
