"""A recipe, which users write, and how it decides about the weights of a model or checkpoint: see `Recipe`."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import dtypes
from ..choices import AUTO, DEFAULT_SCHEME
from ..errors import RecipeError, raise_problems
from ..numerics import schemes
from ..text import shown
from . import kinds

#: for so many patterns without a match, among so many names, the nearest is looked for, which takes a while
_MAX_NEAREST, _MAX_NEAR_NAMES = 5, 20_000
#: of a pattern's length, in characters; a regular expression of any length may still take as long as it likes
_MAX_PATTERN = 4096


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, and the checkpoint tensors that make it: the question that a recipe answers."""

    name: str
    sources: tuple[str, ...]
    dtype: torch.dtype | None
    kind: str  # kinds.LINEAR, kinds.EXPERTS, or the reason why it is neither
    keep: str | None = None  # what it is, if it stays by default and its name does not tell

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.sources)


@dataclass(frozen=True, slots=True)
class Decision:
    """The scheme of one weight, or None; and why."""

    scheme: str | None
    reason: str


@dataclass(frozen=True)
class Recipe:
    """Which weights become FP8, by which scheme, and which stay. Immutable.

    A pattern is a glob over names (``*`` crosses dots), a ``re:`` regular expression (matched from the beginning of the
    name), or a plain name, which also stands for everything below it. Names are those of tensors, with or without
    ``.weight``.

    Embeddings, norms, output heads, MoE routers and shared-expert gates stay by default. A target that spells out a
    full name overrides that, a pattern does not. ``ignore`` beats patterns in ``targets``. Planning refuses two targets
    that give a weight different schemes, and a pattern that matches nothing.

    Args:
        scheme: The scheme of every weight that no target names: ``"fp8_channel"``, ``"fp8_block"``, ``"fp8_tensor"``,
            ``"mxfp8"``, ``"int8_channel"`` or ``"nvfp4"``; or ``"auto"``, which is ``"fp8_channel"``, and where the
            source is quantized already in one of the first three or int8, what keeps that. None quantizes targets only.
        targets: Patterns and their schemes, as a mapping or as pairs.
        ignore: Patterns of weights that stay as they are.

    Raises:
        RecipeError: An unknown scheme, or a pattern that is malformed or given twice.

    Examples:
        >>> recipe = octavo.Recipe()  # every linear layer and expert stack, by fp8_channel
        >>> recipe = octavo.Recipe("fp8_block", ignore=["*.self_attn.*"])  # all but attention
        >>> recipe = octavo.Recipe(None, targets={"re:.*experts.*": "fp8_block"})  # only experts
        >>> print(octavo.plan("path/to/model", recipe))
    """

    scheme: str | None = AUTO
    targets: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    def __init__(
        self,
        scheme: str | None = AUTO,
        targets: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        ignore: Iterable[str] = (),
    ) -> None:
        if isinstance(targets, Mapping):
            targets = targets.items()
        pairs = _checked(targets, _is_pair, "targets must be patterns and their schemes")
        patterns = _checked(ignore, _is_text, "ignore must be a list of patterns")
        counts = Counter(pattern for pattern, _ in pairs)
        repeated = [pattern for pattern, count in counts.items() if count > 1]
        if repeated:
            raise RecipeError(f"the target pattern {min(repeated)!r} is given twice")
        object.__setattr__(self, "scheme", scheme)
        object.__setattr__(self, "targets", tuple((pattern, name) for pattern, name in pairs))
        object.__setattr__(self, "ignore", tuple(patterns))
        for name in self.schemes:
            schemes.get(name)
        for pattern in self.patterns:
            _check_pattern(pattern)

    @property
    def schemes(self) -> tuple[str, ...]:
        """All that it names; for `AUTO`, what that is unless the source tells otherwise."""
        return (*([] if self.default is None else [self.default]), *(s for _, s in self.targets))

    @property
    def default(self) -> str | None:
        """The scheme of what no target names; None: none."""
        return DEFAULT_SCHEME if self.scheme == AUTO else self.scheme

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*(p for p, _ in self.targets), *self.ignore)

    @classmethod
    def coerce(cls, scheme: str | Recipe | Mapping[str, Any] | None, ignore: Iterable[str] = ()) -> Recipe:
        """Make a recipe of what users give as ``scheme``: a name, a recipe or its dict form, or None for no scheme."""
        if isinstance(scheme, Recipe):
            recipe = scheme
        elif isinstance(scheme, Mapping):
            recipe = cls.from_dict(scheme)
        else:
            recipe = cls(scheme)
        if isinstance(ignore, str):
            ignore = [ignore]
        extra = tuple(_checked(ignore, _is_text, "ignore must be a list of patterns"))
        return cls(recipe.scheme, recipe.targets, recipe.ignore + extra) if extra else recipe

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; an unknown key is an error."""
        unknown = [key for key in data if key not in ("scheme", "targets", "ignore")]
        if unknown:
            raise RecipeError(f"unknown recipe key {shown(unknown[0])}; known: scheme, targets, ignore")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {"scheme": self.scheme, "targets": dict(self.targets), "ignore": list(self.ignore)}

    def decide(self, weights: Sequence[Weight]) -> dict[str, Decision]:
        """Parameter name -> decision, for all weights of a model or checkpoint.

        Raises:
            RecipeError: listing every ambiguity, every target that can't be honoured, every pattern without a match.
        """
        problems: list[str] = []
        decisions = {}
        matched: dict[str, bool] = {}  # pattern -> whether a weight that can be quantized is among its matches
        for weight in weights:
            try:
                decisions[weight.name] = self._decide(weight, matched)
            except RecipeError as error:
                problems.append(str(error))
        for pattern in () if problems else self.patterns:
            if pattern not in matched:
                names = (name for weight in weights for name in weight.names)
                near = nearest(pattern, names) if len(problems) < _MAX_NEAREST else None
                said = f"; the nearest name is {near!r}" if near else ""
                problems.append(f"the pattern {pattern!r} matches no tensor{said}")
            elif not matched[pattern] and pattern not in self.ignore:
                problems.append(
                    f"the target {pattern!r} matches only weights that can't be quantized, or stay by default"
                )
        raise_problems(RecipeError, "recipe", problems)
        return decisions

    def _decide(self, weight: Weight, matched: dict[str, bool]) -> Decision:
        ignoring = [p for p in self.ignore if _matches(p, weight)]
        targeting = [(p, s) for p, s in self.targets if _matches(p, weight)]
        for pattern in (*ignoring, *(p for p, _ in targeting)):
            matched.setdefault(pattern, False)
        exact = [p for p, _ in targeting if _is_full_name(p, weight)]
        if weight.dtype not in dtypes.QUANTIZABLE or weight.kind not in kinds.QUANTIZABLE:
            kind = weight.kind if weight.kind not in kinds.QUANTIZABLE else _dtype_reason(weight.dtype)
            if exact:
                raise RecipeError(f"{weight.name}: targeted by {exact[0]!r}, but can't be quantized: {kind}")
            return Decision(None, kinds.default_keep(weight.name) or kind)
        if ignoring and exact:
            raise RecipeError(f"{weight.name}: both ignored by {ignoring[0]!r} and targeted by {exact[0]!r}")
        if ignoring:
            matched.update((p, True) for p, _ in targeting)
            return Decision(None, f"ignored by {ignoring[0]!r}")
        if len({scheme for _, scheme in targeting}) > 1:
            listed = ", ".join(f"{p!r} -> {s}" for p, s in targeting)
            raise RecipeError(f"{weight.name}: matched by targets of different schemes: {listed}")
        default = weight.keep or kinds.default_keep(weight.name)
        if default and not exact:
            return Decision(None, f"{default}, kept by default")
        for pattern, _ in targeting:
            matched[pattern] = True
        if targeting:
            return Decision(targeting[0][1], f"target {targeting[0][0]!r}")
        if self.default is None:
            return Decision(None, "no target matches" if self.targets else "no scheme is asked for")
        return Decision(self.default, weight.kind)


def _dtype_reason(dtype: torch.dtype | None) -> str:
    return f"{dtypes.short(dtype)}, not bf16, fp16 or fp32" if dtype else "a dtype that torch lacks"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str)


def _checked(given: Any, fits: Callable[[Any], bool], rule: str) -> list[Any]:
    """What was given, as a list; a `RecipeError` if it is none, or one of it does not fit."""
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else None
    if given is None:
        found = []
    if found is None or not all(map(fits, found)):
        raise RecipeError(f"{rule}, not {'the text ' if isinstance(given, str) else ''}{shown(given)}")
    return found


def _check_pattern(pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN:
        raise RecipeError(f"a pattern of {len(pattern):,} characters; at most {_MAX_PATTERN:,} are taken")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise RecipeError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    elif not pattern:
        raise RecipeError("an empty pattern")


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _is_full_name(pattern: str, weight: Weight) -> bool:
    return any(pattern in (name, kinds.module_of(name)) for name in weight.names)


def _matches(pattern: str, weight: Weight) -> bool:
    """Return True if the pattern names this weight; a pattern that names only some of its sources is an error."""
    hits = [name for name in weight.sources if _matches_name(pattern, name)]
    if hits and len(hits) < len(weight.sources):
        missed = next(name for name in weight.sources if name not in hits)
        raise RecipeError(
            f"{weight.name} is one parameter made of {len(weight.sources)} tensors, of which {pattern!r} matches "
            f"{hits[0]} but not {missed}"
        )
    return bool(hits) or _matches_name(pattern, weight.name)


def _matches_name(pattern: str, name: str) -> bool:
    candidates = (name, kinds.module_of(name))
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], candidate) for candidate in candidates)
    if _is_glob(pattern):
        return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates)
    return name == pattern or name.startswith(pattern + ".")


def matching(patterns: Iterable[str], names: Collection[str]) -> tuple[str, ...]:
    """Those of some patterns that match any tensor of these names."""
    return tuple(pattern for pattern in patterns if any(_matches_name(pattern, name) for name in names))


def nearest(pattern: str, names: Iterable[str]) -> str | None:
    """The name that is most like a pattern, if one is."""
    import difflib

    close = difflib.get_close_matches(pattern, list(itertools.islice(names, _MAX_NEAR_NAMES)), 1, cutoff=0.6)
    return close[0] if close else None
